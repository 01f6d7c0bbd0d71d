/** The view that compares: one prompt, two models or two settings. */

import { decimal, el, plural } from "./dom.js";
import { labelled, remembered, SamplingFields } from "./fields.js";
import { Generation } from "./generation.js";
import { Inspector } from "./inspector.js";

const SIDES = [
  ["Left", { temperature: 0.3 }],
  ["Right", { temperature: 1 }],
];

export class CompareView {
  constructor(place) {
    this.inspector = new Inspector("Click or tap a character of either text to see how likely its bytes were.");
    this.prompt = el("textarea", { rows: 3, dir: "auto", value: "She was", spellcheck: false });
    this.summary = el("p.summary", { role: "status" });
    this.sides = SIDES.map(([name, values]) => {
      const fields = new SamplingFields(values);
      fields.element.querySelector("legend").textContent = name;
      const generation = new Generation(`${name} text`, this.inspector);
      generation.onEnd = () => this.#ended();
      return { name, fields, generation };
    });
    this.start = el("button.primary", { type: "submit" }, "Compare");
    this.stop = el("button", { type: "button", disabled: true, onclick: () => this.#stop() }, "Stop");
    this.form = el(
      "form",
      { onsubmit: (event) => this.#submit(event), onkeydown: (event) => this.#key(event) },
      labelled("Prompt", this.prompt, "Ctrl+Enter starts both."),
      el("div.columns.even", {}, ...this.sides.map((side) => side.fields.element)),
      el("div.row", {}, this.start, this.stop),
    );
    this.start.parentElement.append(remembered("compare", this.form, () => {}));
    place.append(
      el(
        "div.intro",
        {},
        el("h2", {}, "One prompt, two ways"),
        el("p", {}, "Two models, or one with other settings, side by side: which patches form, and how sure each one is."),
      ),
      this.form,
      this.summary,
      el("div.columns.even", {}, ...this.sides.map((side) => el("div.main", {}, el("h3", {}, side.name), side.generation.element))),
      this.inspector.element,
    );
  }

  #key(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    else if (event.key === "Escape") this.#stop();
  }

  #stop() {
    for (const { generation } of this.sides) generation.stop();
  }

  async #submit(event) {
    event.preventDefault();
    if (!this.sides.every((side) => side.fields.areValid())) return;
    this.summary.textContent = "";
    this.stop.disabled = false;
    const prompt = this.prompt.value.toWellFormed?.() ?? this.prompt.value;
    await Promise.all(this.sides.map(({ fields, generation }) => generation.run({ ...fields.request(), prompt })));
  }

  #ended() {
    if (this.sides.some(({ generation }) => generation.isRunning)) return;
    if (document.activeElement === this.stop) this.start.focus();
    this.stop.disabled = true;
    const [left, right] = this.sides.map(({ generation }) => generation);
    if (!left.bytes.length || !right.bytes.length) return;
    let same = 0;
    while (same < left.bytes.length && left.bytes[same] === right.bytes[same]) same++;
    const size = ({ bytes, starts }) => decimal(bytes.length / Math.max(1, starts.filter(Boolean).length));
    const alike = same ? `They begin with the same ${plural(same, "byte")}.` : "They differ from the first byte on.";
    this.summary.textContent =
      `${alike} Bits per byte: left ${decimal(left.bitsPerByte)}, ` +
      `right ${decimal(right.bitsPerByte)}. Mean patch: left ${size(left)} bytes, right ${size(right)} bytes.`;
  }
}
