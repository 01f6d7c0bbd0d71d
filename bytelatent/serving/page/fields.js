/** Fields for how a text is sampled, and the request that they make. */

import { el } from "./dom.js";
import { keep, kept, server } from "./state.js";

let lastId = 0;

/** A label with its field below it. */
export function labelled(label, field, note) {
  field.id ||= `field-${++lastId}`;
  const hint = note && el("span.note", { id: `${field.id}-note` }, note);
  if (hint) field.setAttribute("aria-describedby", hint.id);
  return el("div.field", {}, el("label", { for: field.id }, label), field, hint ?? null);
}

const number = (name, value, min, max, step) =>
  el("input", { type: "number", name, value, min, max, step, required: true, inputMode: "decimal" });

/** Temperature, top-p, seed, bytes and stop texts; a model where the server has several. */
export class SamplingFields {
  constructor({ temperature = 0.8, seed = 0 } = {}) {
    this.model = el("select", { name: "model" });
    this.temperature = number("temperature", temperature, 0, 2, 0.05);
    this.topP = number("top_p", 0.95, 0.01, 1, 0.01);
    this.seed = number("seed", seed, 0, 2 ** 31, 1);
    this.maxBytes = number("max_tokens", 200, 1, 16384, 1);
    this.stops = el("input", { name: "stop", placeholder: "such as \\n\\n", autocomplete: "off", spellcheck: false });
    const choice = labelled("Model", this.model);
    this.element = el(
      "fieldset.sampling",
      {},
      el("legend", {}, "Sampling"),
      choice,
      labelled("Temperature", this.temperature),
      labelled("Top-p", this.topP),
      labelled("Seed", this.seed),
      labelled("Bytes", this.maxBytes),
      labelled("Stop texts", this.stops, "Write | between several. \\n is a line break."),
    );
    server.subscribe(({ models }) => {
      choice.hidden = models.length < 2;
      const chosen = this.model.value;
      this.model.replaceChildren(...models.map((name) => el("option", { value: name }, name)));
      if (models.includes(chosen)) this.model.value = chosen;
    });
  }

  /** The fields of a request that are not its text. */
  request() {
    const stop = this.stops.value
      .split("|")
      .map((text) => text.replaceAll("\\n", "\n").replaceAll("\\t", "\t"))
      .filter((text) => text);
    return {
      ...(this.model.value && { model: this.model.value }),
      max_tokens: Number(this.maxBytes.value),
      temperature: Number(this.temperature.value),
      top_p: Number(this.topP.value),
      seed: Number(this.seed.value),
      ...(stop.length && { stop }),
    };
  }

  /** Whether all fields hold what they may; the first that does not says so. */
  areValid() {
    return [this.temperature, this.topP, this.seed, this.maxBytes].every((field) => field.reportValidity());
  }
}

/**
 * Keep the fields of `place` over a reload, under `name`; its other contents are its own.
 * Returns a button that puts the first values back; `onBack()` is called after it.
 */
export function remembered(name, place, onBack) {
  const fields = [...place.querySelectorAll("input, textarea, select")];
  const values = () => fields.map((field) => (field.type === "radio" ? field.checked : field.value));
  const fill = (given) => fields.forEach((field, i) => (field[field.type === "radio" ? "checked" : "value"] = given[i]));
  const first = values();
  const last = kept(name);
  if (last?.length === fields.length) fill(last);
  const save = () => {
    const isFirst = values().every((value, i) => value === first[i]);
    back.hidden = isFirst;
    keep(name, isFirst ? null : values());
  };
  const back = el("button.quiet", { type: "button", onclick: () => (fill(first), save(), onBack()) }, "Back to the example");
  place.addEventListener("input", save);
  save();
  return back;
}
