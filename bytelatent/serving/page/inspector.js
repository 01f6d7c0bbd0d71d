/** What is known about the bytes of one character. */

import { decimal, el, plural } from "./dom.js";
import { byteName, codePoints, decode, hex } from "./text.js";

export class Inspector {
  /** `hint`: what to do, while nothing is chosen. */
  constructor(hint) {
    this.hint = hint;
    this.element = el("section.inspector", { "aria-label": "The chosen character" });
    // Read aloud only what was chosen on purpose, not all that a mouse passes over.
    this.spoken = el("p.unseen", { role: "status" });
    this.body = el("div");
    this.element.append(this.body, this.spoken);
    this.clear();
  }

  clear() {
    this.body.replaceChildren(el("p.note", {}, this.hint));
    this.spoken.textContent = "";
  }

  /**
   * `bytes`: of the character; `from`: where they begin; `rows`: for each byte its cells in words, by column;
   * `patch`: `{number, count, size}` of its first byte; `alternatives`: for each byte `[byte or null, log p]` pairs.
   * Returns the element, which may lie over the text on a small screen.
   */
  show({ bytes, from, columns, rows, patch, alternatives, byUser }) {
    const { shown } = decode(bytes, 0, bytes.length);
    const where = bytes.length === 1 ? `byte ${from + 1}` : `bytes ${from + 1} to ${from + bytes.length}`;
    const inPatch = patch ? `patch ${patch.number} of ${patch.count}, ${plural(patch.size, "byte")}` : "in the patch that the prompt ends with";
    const head = el(
      "div.inspected",
      {},
      el("span.glyph", { dir: "auto" }, shown.trim() || "␣"),
      el("p", {}, `${plural(bytes.length, "byte")} · ${where} · ${inPatch}`, el("br"), el("span.note", {}, names(bytes))),
    );
    const header = ["byte", ...columns, ...(alternatives ? ["likeliest"] : [])];
    const table = el(
      "table",
      {},
      el("thead", {}, el("tr", {}, ...header.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, ...rows.map((cells, i) => this.#row(bytes[i], cells, alternatives?.[i]))),
    );
    const scroll = el("div.scroll", { tabIndex: 0, role: "group", "aria-label": "Bytes of the character" }, table);
    this.body.replaceChildren(head, scroll);
    if (byUser) {
      const values = columns.map((name, i) => `${name} ${rows[0][i]}`).join(", ");
      this.spoken.textContent = `${shown.trim() || "space"}, ${plural(bytes.length, "byte")}, ${inPatch}, ${values}`;
    }
    return this.element;
  }

  #row(byte, cells, alternatives) {
    const likeliest = alternatives && el("td", {}, el("ol.likeliest", {}, ...alternatives.map((pair) => this.#choice(pair, byte))));
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, el("code", {}, hex(byte)), byte < 0x80 ? ` ${byteName(byte)}` : ""),
      ...cells.map((cell) => el("td", {}, cell)),
      likeliest,
    );
  }

  #choice([byte, logprob], drawn) {
    const p = Math.exp(logprob);
    const bar = el("i", { "aria-hidden": "true" });
    bar.style.inlineSize = `${(100 * p).toFixed(1)}%`;
    return el(byte === drawn ? "li.drawn" : "li", {}, bar, el("code", {}, byteName(byte)), ` ${decimal(100 * p, 1)} %`);
  }
}

function names(bytes) {
  const all = codePoints(bytes);
  return all.length > 8 ? `${all.slice(0, 8).join(" ")} …` : all.join(" ");
}

export const probability = (logprob) => (Number.isFinite(logprob) ? `${decimal(100 * Math.exp(logprob), 1)} %` : "–");
