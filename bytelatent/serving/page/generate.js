/** The view of generation: a prompt or a chat, continued byte by byte. */

import { commandsOf } from "./commands.js";
import { el } from "./dom.js";
import { labelled, remembered, SamplingFields } from "./fields.js";
import { Generation } from "./generation.js";
import { Inspector } from "./inspector.js";

const PROMPT = "She was";

export class GenerateView {
  constructor(place) {
    this.turns = []; // of a chat: {role, content}
    this.running = null;
    this.inspector = new Inspector("Click or tap a character, or focus the text and use the arrow keys, to see how likely its bytes were, and what else was.");
    this.fields = new SamplingFields();
    this.prompt = el("textarea", { rows: 4, dir: "auto", value: PROMPT, spellcheck: false });
    this.system = el("textarea", { rows: 2, dir: "auto", placeholder: "none" });
    this.systemField = labelled("System message", this.system);
    this.label = labelled("Prompt", this.prompt, "Ctrl+Enter generates.");
    this.commands = commandsOf(() => this.#body());
    this.output = el("div.output");
    this.start = el("button.primary", { type: "submit" }, "Generate");
    this.stop = el("button", { type: "button", disabled: true, onclick: () => this.running?.stop() }, "Stop");
    this.renew = el("button.quiet", { type: "button", hidden: true, onclick: () => this.#forget() }, "New chat");
    this.form = el(
      "form.main",
      { onsubmit: (event) => this.#submit(event), oninput: () => this.commands.refresh(), onkeydown: (event) => this.#key(event) },
      this.#kinds(),
      this.systemField,
      this.label,
      this.fields.element,
      el("div.row", {}, this.start, this.stop, this.renew),
      this.commands.element,
    );
    const chosen = () => this.#setKind(this.form.elements.kind.value);
    const back = remembered("generate", this.form, chosen);
    this.start.parentElement.append(back);
    chosen();
    place.append(
      el(
        "div.intro",
        {},
        el("h2", {}, "Text, byte by byte"),
        el("p", {}, "Patches are coloured as they form. The line shows how unlikely each byte was, in nats (1\u00a0nat\u00a0=\u00a01.44\u00a0bits): flat where the model was sure."),
      ),
      el("div.columns.even", {}, this.form, el("div.main", {}, this.output, this.inspector.element)),
    );
  }

  #kinds() {
    const kind = (value, label) => {
      const radio = el("input", { type: "radio", name: "kind", value, checked: value === "plain", onchange: () => this.#setKind(value) });
      return el("label", {}, radio, ` ${label}`);
    };
    return el("fieldset.kinds", {}, el("legend.unseen", {}, "Kind"), kind("plain", "Continue a text"), kind("chat", "Chat"));
  }

  #setKind(kind) {
    this.kind = kind;
    const isChat = kind === "chat";
    this.systemField.hidden = !isChat;
    this.label.firstChild.textContent = isChat ? "Message" : "Prompt";
    this.#forget();
    this.commands.refresh();
  }

  #forget() {
    this.running?.stop();
    this.turns = [];
    this.renew.hidden = true;
    this.inspector.clear();
    this.output.replaceChildren(el("p.empty", {}, "The text appears here."));
  }

  #body() {
    const fields = this.fields.request();
    if (this.kind === "plain") return { ...fields, prompt: this.prompt.value.toWellFormed?.() ?? this.prompt.value };
    const system = this.system.value ? [{ role: "system", content: this.system.value }] : [];
    return { ...fields, messages: [...system, ...this.turns, { role: "user", content: this.prompt.value }] };
  }

  #key(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    else if (event.key === "Escape") this.running?.stop();
  }

  async #submit(event) {
    event.preventDefault();
    if (!this.fields.areValid()) return;
    this.running?.stop();
    const body = this.#body();
    const text = this.prompt.value;
    const isChat = this.kind === "chat";
    const generation = new Generation(isChat ? "Answer" : "Generated text", this.inspector);
    if (!isChat || !this.turns.length) this.output.replaceChildren();
    const sent = el("p.prompt", { dir: "auto" }, text);
    this.output.append(el("h3.unseen", {}, isChat ? "You" : "Prompt"), sent, generation.element);
    generation.element.scrollIntoView({ block: "nearest" });
    generation.onEnd = () => this.#ended(generation);
    this.running = generation;
    this.stop.disabled = false;
    await generation.run(body);
    if (isChat && this.kind === "chat" && generation.bytes.length) {
      this.turns.push({ role: "user", content: text }, { role: "assistant", content: generation.string });
      this.renew.hidden = false;
      if (this.prompt.value === text) this.prompt.value = "";
    }
  }

  #ended(generation) {
    if (this.running !== generation) return;
    // The button that had the focus must not vanish under it.
    if (document.activeElement === this.stop) this.start.focus();
    this.stop.disabled = true;
    this.commands.refresh();
  }
}
