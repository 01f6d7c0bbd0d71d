/** The view of patches: a text, where it is hard to guess, and where patches start. */

import { decimal, el, oncePerFrame, percent, plural, whole } from "./dom.js";
import { PatchedText } from "./drawing.js";
import { labelled } from "./fields.js";
import { Histogram } from "./histogram.js";
import { Inspector } from "./inspector.js";
import { clearProblem, showProblem } from "./problems.js";
import { Reading } from "./reading.js";
import { count, flopsSaved } from "./starts.js";
import { keep, kept, server } from "./state.js";
import { countCharacters } from "./text.js";
import { TextField } from "./textfield.js";
import { ThresholdBar } from "./threshold.js";

const EXAMPLES = {
  English: "The Byte Latent Transformer groups bytes into patches. A patch begins where the next byte is hard to guess: at the start of a word, rarely at its end.\n",
  Code: "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
  Numbers: "In 1687, 42 of 365 days; pi is 3.14159 26535 89793, and 2**64 is 18446744073709551616.\n",
  Russian: "Байты складываются в участки там, где следующий байт трудно угадать.\n",
  Arabic: "تبدأ الرقعة حيث يصعب تخمين البايت التالي.\n",
  Hindi: "जहाँ अगला बाइट कठिन हो, वहाँ नया पैच शुरू होता है।\n",
  Emoji: "👩‍🔬 measures 🌡️, 👨‍👩‍👧‍👦 waits: é is two code points, 🇯🇵 as well.\n",
};
const PAUSE = 60; // milliseconds of rest after a key, before the text is read

export class PatchesView {
  constructor(place) {
    const { threshold = null, coloured = "own", size = 4, text = EXAMPLES.English } = { ...kept("patches"), ...kept("text") };
    this.threshold = threshold;
    this.coloured = coloured;
    this.reading = new Reading(() => this.update());
    this.update = oncePerFrame(() => this.#update());
    this.inspector = new Inspector("Point at or tap a character, or focus the text and use the arrow keys, to see its bytes.");
    this.problem = el("div");
    this.status = el("p.note.status", { role: "status" });
    this.#build(place, size);
    this.input.value = text;
    this.#changed();
  }

  #build(place, size) {
    this.input = new TextField(() => this.#changed());
    const examples = Object.entries(EXAMPLES).map(([name, text]) =>
      el("button.chip", { type: "button", onclick: () => this.show(text) }, name),
    );
    const figure = el("div");
    this.drawing = new PatchedText(figure, { label: "Text in patches", onInspect: (what) => this.#inspect(what) });
    figure.classList.add("with-threshold");
    this.bar = new ThresholdBar(this.drawing, (threshold) => this.setThreshold(threshold));
    this.histogram = new Histogram((threshold) => this.setThreshold(threshold));
    this.reset = el("button.quiet", { type: "button", onclick: () => this.setThreshold(null) }, "Reset to the model's");
    this.facts = el("dl.facts");
    this.cost = el("p.note");
    this.size = el("input.small", { type: "number", min: 1, max: 64, value: size, "aria-label": "Bytes per patch", oninput: () => this.update() });
    this.modes = this.#modes();
    this.thresholdBox = el("section", {}, el("h3", {}, "Threshold"), this.histogram.element, this.reset);
    place.append(
      el(
        "div.intro",
        {},
        el("h2", {}, "Where is the next byte hard to guess?"),
        el("p", {}, "There a patch begins. A small byte LM reads the text; the line is its entropy before each byte, in nats (1\u00a0nat\u00a0=\u00a01.44\u00a0bits). Where it rises above the threshold, the large transformer takes another step."),
      ),
      labelled("Text", this.input.element),
      this.input.note,
      el("div.chips", { role: "group", "aria-label": "Examples" }, ...examples),
      this.problem,
      el(
        "div.columns",
        {},
        el("div.main", {}, figure, this.status, this.inspector.element),
        (this.side = el(
          "div.side",
          { hidden: true }, // until the model is known
          el("div", {}, this.facts, this.cost),
          this.thresholdBox,
          el("section", {}, el("h3", {}, "Modes"), el("div.scroll", { tabIndex: 0, role: "group", "aria-label": "Table of modes" }, this.modes), el("p.note", {}, "The chosen mode colours the text; the others are the bars below it, in this order. FLOPs saved: of a forward pass, against one patch per byte.")),
        )),
      ),
    );
  }

  #modes() {
    const rows = { own: el("span", {}, "entropy"), space: "space", static: el("span", {}, "static ", this.size) };
    this.cells = {};
    this.names = rows;
    const body = Object.entries(rows).map(([key, name]) => {
      const radio = el("input", { type: "radio", name: "coloured", value: key, checked: key === this.coloured, onchange: () => this.#colour(key) });
      radio.setAttribute("aria-label", `Colour the text by mode ${key}`);
      this.cells[key] = [el("td"), el("td"), el("td")];
      return el("tr", {}, el("th", { scope: "row" }, radio, " ", name), ...this.cells[key]);
    });
    const head = ["mode", "patches", "mean bytes", "FLOPs saved"].map((name) => el("th", { scope: "col" }, name));
    return el("table.modes", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
  }

  /** Put a text into the field and read it. */
  show(text) {
    this.input.value = text;
    this.#changed();
  }

  /** Null: the model's own. */
  setThreshold(threshold) {
    this.threshold = threshold;
    this.update();
  }

  #colour(key) {
    this.coloured = key;
    this.update();
  }

  #changed() {
    clearTimeout(this.pause);
    this.reading.setText(this.input.value);
    this.inspector.clear();
    this.drawing.setBytes(this.reading.bytes);
    this.update();
    // A long text may take the server longer than a key press lasts.
    this.pause = setTimeout(() => this.#read(), this.reading.isDone ? 0 : PAUSE);
    keep("text", { text: this.input.value });
  }

  async #read() {
    clearProblem(this.problem);
    try {
      await this.reading.read(server.get("models")[0]);
    } catch (error) {
      showProblem(this.problem, error, () => this.#read());
    }
    this.update();
  }

  #update() {
    const { reading, drawing } = this;
    const { about } = reading;
    if (!about) return;
    const entropies = reading.entropies();
    const threshold = entropies && (this.threshold ?? about.threshold);
    const size = Math.max(1, Math.min(64, Math.round(Number(this.size.value)) || 4));
    const starts = { own: reading.own(threshold), space: reading.mode("space"), static: reading.static(size) };
    this.side.hidden = false;
    keep("patches", { threshold: this.threshold, coloured: this.coloured, size });
    this.shown = starts[this.coloured];
    const top = entropies ? topOf(entropies, threshold) : 1;
    // A bar in the line of entropies is a threshold only where entropies themselves are compared with it.
    const isLine = entropies && about.patching.decision !== "rise";
    const others = Object.keys(starts).filter((key) => key !== this.coloured).map((key) => starts[key]);
    drawing.setMarks({ values: entropies, top, starts: this.shown, threshold: isLine ? threshold : null, rulers: others });
    this.bar.show(isLine ? threshold : null);
    this.thresholdBox.hidden = !isLine;
    if (isLine) this.histogram.draw(entropies, top, threshold);
    this.reset.hidden = this.threshold === null || this.threshold === about.threshold;
    this.reset.textContent = `Reset to the model's ${decimal(about.threshold)}`;
    this.#sum(starts, entropies);
  }

  #sum(starts, entropies) {
    const { reading } = this;
    const { about, numRead, bytes } = reading;
    this.names.own.textContent = about.mode;
    for (const [key, its] of Object.entries(starts)) {
      const patches = count(its);
      const byEntropy = key === "own" && Boolean(entropies);
      const saved = patches ? flopsSaved(about.flops, numRead, patches, byEntropy) : NaN;
      const values = [whole(patches), decimal(numRead / patches), percent(saved)];
      values.forEach((value, i) => (this.cells[key][i].textContent = value));
      if (key !== this.coloured) continue;
      this.#facts(patches, saved, entropies);
      this.cost.textContent = !(saved < 0) ? "" : `Costs more FLOPs than one patch per byte${byEntropy ? ": the entropy model's share is included" : ""}.`;
    }
    const isAll = reading.isDone || this.problem.hasChildNodes(); // which says what it waits for
    this.status.textContent = isAll ? "" : `Read ${whole(numRead)} of ${plural(bytes.length, "byte")} …`;
  }

  #facts(patches, saved, entropies) {
    const { bytes, numRead } = this.reading;
    const mean = entropies ? meanOf(entropies) : NaN;
    const facts = [
      ["mean patch", patches ? `${decimal(numRead / patches, numRead / patches < 100 ? 2 : 0)} bytes` : "–"],
      ["FLOPs saved", percent(saved)],
      ["patches", whole(patches)],
      ["bytes", whole(bytes.length)],
      ["characters", whole(countCharacters(bytes))],
      ...(entropies ? [["mean entropy", numRead ? `${decimal(mean)} nats` : "–"]] : []),
    ];
    this.facts.replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  #inspect({ from, to, byUser }) {
    const bytes = this.reading.bytes.slice(from, to);
    const entropies = this.reading.entropies();
    const { shown } = this;
    const columns = [...(entropies ? ["entropy, nats"] : []), "starts a patch"];
    const rows = Array.from(bytes, (_, i) => [
      ...(entropies ? [decimal(entropies[from + i])] : []),
      shown?.[from + i] === 1 ? "yes" : "",
    ]);
    return this.inspector.show({ bytes, from, columns, rows, patch: shown && patchAt(shown, from), byUser });
  }
}

function patchAt(starts, at) {
  let begin = at;
  while (begin > 0 && starts[begin] !== 1) begin--;
  let end = at + 1;
  while (end < starts.length && starts[end] !== 1) end++;
  return { number: count(starts.subarray(0, begin + 1)), count: count(starts), size: end - begin };
}

/** The top of the line: whole nats, so that it rarely moves. */
function topOf(entropies, threshold) {
  let top = Math.max(4, threshold);
  for (const value of entropies) if (value > top) top = value;
  return Math.ceil(top - 0.05);
}

function meanOf(values) {
  let sum = 0;
  let size = 0;
  for (const value of values) {
    if (Number.isFinite(value)) [sum, size] = [sum + value, size + 1];
  }
  return sum / size;
}
