/**
 * A text with its patches. The text itself is plain text in the document, so that every script is shaped as it should
 * be, can be selected and read aloud; patches and the line of values are drawn on a canvas behind it, from where the
 * browser has put each character. A long text is cut into blocks, and only blocks in sight are measured and drawn.
 */

import { Axis } from "./axis.js";
import { oncePerFrame } from "./dom.js";
import { measured } from "./measuring.js";
import { numbered } from "./starts.js";
import { theme } from "./state.js";
import { cut, decode } from "./text.js";

const BLOCK = { least: 700, most: 1600, lines: 24 }; // bytes, and lines, of a block
const LANE = 46; // pixels of the line of values above each row
const RULER = 6; // of each further mode below it
const OVER = matchMedia("(max-width: 60rem), (pointer: coarse)"); // what is inspected lies over the text: see style.css
const MAX_SIDE = 8192; // pixels of a canvas

export class PatchedText {
  /**
   * `host`: an empty element that scrolls. `label`: its name. `onInspect({from, to, byUser})`: a character was pointed
   * at or reached with the arrow keys; it returns an element that may lie over the text.
   */
  constructor(host, { label, onInspect = () => {} }) {
    this.host = host;
    this.onInspect = onInspect;
    this.bytes = new Uint8Array();
    this.blocks = [];
    this.marks = { values: null, starts: null, top: 1, threshold: null, rulers: [] };
    this.selected = null;
    this.numbers = new WeakMap();
    host.classList.add("patched");
    host.tabIndex = 0;
    host.setAttribute("role", "region");
    host.setAttribute("aria-label", label);
    this.page = host.appendChild(document.createElement("div"));
    this.page.className = "page";
    this.page.dir = "auto";
    this.axis = new Axis(this);
    this.#layOut();
    this.seen = new IntersectionObserver((entries) => this.#onSight(entries), { root: host, rootMargin: "400px 0px" });
    this.redraw = oncePerFrame(() => this.draw());
    new ResizeObserver(() => this.#remeasure()).observe(this.page);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", this.redraw);
    theme.subscribe(this.redraw);
    document.fonts.ready.then(() => this.#remeasure());
    host.addEventListener("pointermove", (event) => event.pointerType === "mouse" && !OVER.matches && this.#point(event, false));
    host.addEventListener("click", (event) => this.#point(event, true));
    host.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Show other bytes; blocks that are still the same stay as they are. */
  setBytes(bytes) {
    const ranges = cut(bytes, BLOCK.least, BLOCK.most, BLOCK.lines);
    let same = 0;
    while (same < ranges.length && same < this.blocks.length && this.#isSame(this.blocks[same], bytes, ranges[same])) same++;
    for (const block of this.blocks.splice(ranges.length)) {
      this.seen.unobserve(block.element);
      block.element.remove();
    }
    for (let number = same; number < ranges.length; number++) {
      const block = this.blocks[number] ?? this.#newBlock();
      this.#fill(block, bytes, ...ranges[number]);
    }
    this.bytes = bytes;
    if (this.selected && this.selected.from >= bytes.length) this.selected = null;
    if (same < ranges.length) this.redraw();
  }

  /**
   * What is drawn, by byte: `values` (Float32Array, NaN where there is none) up to `top`, `starts` (flags),
   * `threshold` or null, `rulers` (lists of flags, of further modes).
   */
  setMarks(marks) {
    const before = this.marks;
    this.marks = { ...before, ...marks };
    const changes = before.rulers.length !== this.marks.rulers.length || !before.values !== !this.marks.values;
    if (changes) this.#layOut();
    this.axis.place();
    this.redraw();
  }

  /** The patches of flags, counted once for all blocks. */
  #numbered(flags) {
    const known = this.numbers.get(flags) ?? numbered(flags);
    this.numbers.set(flags, known);
    return known;
  }

  /** Heights in pixels: of a row, of the lane of values in it, and where the first row begins in `host`. */
  get geometry() {
    return { row: this.row, lane: this.lane, first: this.page.offsetTop };
  }

  /** Where a value lies below the top of its row. */
  yOf(value) {
    return 4 + (this.lane - 6) * (1 - Math.min(value / this.marks.top, 1));
  }

  valueAt(y) {
    return Math.max(0, Math.min(1, 1 - (y - 4) / (this.lane - 6))) * this.marks.top;
  }

  /** Mark the character that byte `at` is in. */
  select(at) {
    const block = this.blocks.find((each) => at < each.to);
    if (!block) return;
    this.#measure(block);
    const index = block.glyphs.findIndex((glyph) => at < glyph.to);
    this.#choose(block, Math.max(index, 0), true);
  }

  #isSame(block, bytes, [from, to]) {
    if (block.from !== from || block.to !== to) return false;
    for (let i = from; i < to; i++) if (bytes[i] !== this.bytes[i]) return false;
    return true;
  }

  #newBlock() {
    const element = document.createElement("div");
    element.className = "block";
    const node = element.appendChild(document.createElement("span")).appendChild(document.createTextNode(""));
    const block = { element, node, canvas: null };
    element.block = block;
    this.blocks.push(block);
    this.page.append(element);
    this.seen.observe(element);
    return block;
  }

  #fill(block, bytes, from, to) {
    const { shown, at } = decode(bytes, from, to);
    block.node.data = shown;
    const rows = shown.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / 70)), 0);
    block.element.style.containIntrinsicBlockSize = `auto ${rows * this.row}px`;
    Object.assign(block, { from, to, shown, at, glyphs: null });
  }

  #layOut() {
    this.lane = this.marks.values ? LANE : 4;
    this.text = 26;
    this.row = this.lane + this.text + RULER * this.marks.rulers.length + 8;
    this.shift = this.lane + this.text / 2 - this.row / 2;
    this.host.style.setProperty("--row", `${this.row}px`);
    this.host.style.setProperty("--shift", `${this.shift}px`);
    this.#remeasure();
  }

  #remeasure() {
    for (const block of this.blocks) block.glyphs = null;
    this.redraw?.();
  }

  #onSight(entries) {
    for (const { target, isIntersecting } of entries) {
      const { block } = target;
      if (isIntersecting && !block.canvas) {
        block.canvas = document.createElement("canvas");
        block.canvas.setAttribute("aria-hidden", "true");
        target.prepend(block.canvas);
        this.#drawBlock(block, this.#colours());
      } else if (!isIntersecting && block.canvas) {
        block.canvas.remove();
        block.canvas = block.glyphs = null;
      }
    }
  }

  draw() {
    const colours = this.#colours();
    for (const block of this.blocks) if (block.canvas) this.#drawBlock(block, colours);
  }

  #colours() {
    const style = getComputedStyle(this.host);
    const of = (name) => style.getPropertyValue(name).trim();
    return {
      fills: [of("--patch-a"), of("--patch-b")],
      lines: [of("--accent"), of("--patch-line-b")],
      value: of("--value"),
      accent: of("--accent"),
      faint: of("--faint"),
      ink: of("--ink"),
    };
  }

  #measure(block) {
    block.glyphs ??= measured(block, this.row, this.shift);
  }

  #drawBlock(block, colours) {
    this.#measure(block);
    const { canvas, width, height } = block;
    const ratio = Math.min(devicePixelRatio || 1, MAX_SIDE / Math.max(width, height, 1));
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const { starts, values, rulers, threshold } = this.marks;
    const rows = block.glyphs.reduce((most, glyph) => Math.max(most, glyph.row), 0) + 1;
    if (starts) {
      this.#drawPatches(context, block, this.#numbered(starts), (run, odd) => {
        const top = run.row * this.row + this.lane;
        context.fillStyle = colours.fills[odd];
        rounded(context, run.left + 0.75, top + 1, run.width - 1.5, this.text - 3, 3);
        context.fillStyle = colours.lines[odd];
        context.fillRect(run.left + 1, top + this.text - (odd ? 1.5 : 2.5), run.width - 2, odd ? 1.5 : 2.5);
      });
    }
    rulers.forEach((flags, number) => {
      this.#drawPatches(context, block, this.#numbered(flags), (run, odd) => {
        const top = run.row * this.row + this.lane + this.text + 3 + number * RULER;
        context.fillStyle = odd ? colours.faint : colours.value;
        context.fillRect(run.left + 0.75, top, run.width - 1.5, 3);
      });
    });
    context.fillStyle = colours.faint;
    for (const { row, left, right, isSpace } of block.glyphs) {
      if (!isSpace) continue;
      context.beginPath();
      context.arc((left + right) / 2, row * this.row + this.lane + this.text / 2, 1.2, 0, 7);
      context.fill();
    }
    if (values) this.#drawValues(context, block, colours, rows);
    if (values && threshold !== null) {
      context.strokeStyle = colours.accent;
      context.lineWidth = 1;
      context.setLineDash([4, 3]);
      context.beginPath();
      for (let row = 0; row < rows; row++) {
        const y = Math.round(row * this.row + this.yOf(threshold)) + 0.5;
        context.moveTo(0, y);
        context.lineTo(width, y);
      }
      context.stroke();
      context.setLineDash([]);
    }
    const { selected } = this;
    const chosen = selected && block.glyphs.find((glyph) => glyph.from === selected.from);
    if (chosen) {
      context.strokeStyle = colours.ink;
      context.lineWidth = 2;
      const top = chosen.row * this.row + this.lane;
      context.strokeRect(chosen.left - 1, top, Math.max(chosen.right - chosen.left, 3) + 2, this.text);
    }
  }

  /** Call `paint(run, odd)` for each stretch of a patch that lies together in a row. `patchOf[i]`: of byte i. */
  #drawPatches(context, block, patchOf, paint) {
    let run = null;
    const close = () => {
      if (run && run.right - run.left > 0) paint({ ...run, width: Math.max(run.right - run.left, 2) }, run.patch % 2);
      run = null;
    };
    for (const glyph of block.glyphs) {
      const step = (glyph.end - glyph.begin) / (glyph.to - glyph.from);
      for (let i = glyph.from; i < glyph.to; i++) {
        const patch = patchOf[i];
        if (patch < 0) {
          close();
          continue;
        }
        const begin = glyph.begin + step * (i - glyph.from);
        const [left, right] = step < 0 ? [begin + step, begin] : [begin, begin + step];
        const touches = run && run.patch === patch && run.row === glyph.row && left <= run.right + 1 && right >= run.left - 1;
        if (touches) {
          run.left = Math.min(run.left, left);
          run.right = Math.max(run.right, right);
        } else {
          close();
          run = { patch, row: glyph.row, left, right };
        }
      }
    }
    close();
  }

  /** A line of the values in steps, with a dot where a patch starts. */
  #drawValues(context, block, colours, rows) {
    const { values, starts } = this.marks;
    const base = (row) => row * this.row + this.lane - 2;
    context.fillStyle = colours.faint;
    for (let row = 0; row < rows; row++) context.fillRect(0, base(row), block.width, 0.5);
    const dots = [];
    context.strokeStyle = colours.value;
    context.lineWidth = 1.25;
    context.lineJoin = "round";
    context.beginPath();
    let last = null;
    for (const glyph of block.glyphs) {
      const step = (glyph.end - glyph.begin) / (glyph.to - glyph.from);
      for (let i = glyph.from; i < glyph.to; i++) {
        const value = values[i];
        if (!Number.isFinite(value)) {
          last = null;
          continue;
        }
        const begin = glyph.begin + step * (i - glyph.from);
        const y = glyph.row * this.row + this.yOf(value);
        const joined = last && last.row === glyph.row && Math.abs(last.x - begin) < 1.5;
        if (joined) context.lineTo(begin, y);
        else context.moveTo(begin, y);
        context.lineTo(begin + step, y);
        if (starts?.[i]) dots.push([begin + step / 2, y]);
        last = { row: glyph.row, x: begin + step };
      }
    }
    context.stroke();
    context.fillStyle = colours.accent;
    for (const [x, y] of dots) {
      context.beginPath();
      context.arc(x, y, 2.5, 0, 7);
      context.fill();
    }
  }

  /** The character at a pointer, in the row and its lane. */
  #point(event, byUser) {
    const element = event.target.closest?.(".block");
    if (!element?.block) return;
    const { block } = element;
    this.#measure(block);
    const box = element.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / this.row);
    const x = event.clientX - box.left;
    const index = block.glyphs.findIndex((glyph) => glyph.row === row && x >= glyph.left && x < glyph.right);
    if (index >= 0) this.#choose(block, index, byUser);
  }

  #choose(block, index, byUser) {
    const glyph = block.glyphs[index];
    if (!glyph || (!byUser && this.selected?.from === glyph.from)) return;
    this.selected = { from: glyph.from, to: glyph.to };
    this.redraw();
    const over = this.onInspect({ ...this.selected, byUser });
    const bottom = block.element.getBoundingClientRect().top + (glyph.row + 1) * this.row;
    if (byUser && over) scrollBy(0, Math.max(0, bottom - over.getBoundingClientRect().top));
  }

  #key(event) {
    if (event.target !== this.host || event.altKey || event.ctrlKey || event.metaKey || !this.blocks.length) return;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: "up", ArrowDown: "down", Home: "first", End: "last" };
    const move = moves[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const at = this.selected?.from ?? -1;
    let number = Math.max(0, this.blocks.findIndex((block) => at < block.to));
    let block = this.blocks[number];
    this.#measure(block);
    let index = block.glyphs.findIndex((glyph) => glyph.from === at);
    if (move === "first") [number, index] = [0, 0];
    else if (move === "last") [number, index] = [this.blocks.length - 1, Infinity];
    else if (typeof move === "number") index = at < 0 ? 0 : index + move;
    else index = rowAway(block.glyphs, Math.max(index, 0), move === "up" ? -1 : 1);
    if (index < 0 && number > 0) [number, index] = [number - 1, Infinity];
    else if (index >= block.glyphs.length && move !== "last" && number + 1 < this.blocks.length) [number, index] = [number + 1, 0];
    block = this.blocks[number];
    this.#measure(block);
    index = Math.max(0, Math.min(index, block.glyphs.length - 1));
    this.#scrollTo(block, block.glyphs[index]);
    this.#choose(block, index, true);
  }

  #scrollTo(block, glyph) {
    const top = block.element.offsetTop + glyph.row * this.row;
    const { scrollTop, clientHeight } = this.host;
    if (top < scrollTop) this.host.scrollTop = top - this.row / 2;
    else if (top + this.row > scrollTop + clientHeight) this.host.scrollTop = top + 1.5 * this.row - clientHeight;
  }
}

/** The glyph nearest to one, in the row above or below; beyond the ends if there is none. */
function rowAway(glyphs, index, step) {
  const from = glyphs[index];
  let best = step < 0 ? -1 : glyphs.length;
  let nearest = Infinity;
  glyphs.forEach((glyph, i) => {
    const distance = Math.abs(glyph.left - from.left);
    if (glyph.row === from.row + step && distance < nearest) [best, nearest] = [i, distance];
  });
  return best;
}

function rounded(context, x, y, width, height, radius) {
  context.beginPath();
  context.roundRect(x, y, Math.max(width, 0.5), height, Math.min(radius, width / 2));
  context.fill();
}
