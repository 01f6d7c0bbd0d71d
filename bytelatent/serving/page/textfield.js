/** The field that a text is typed or pasted into: no longer than the page can show, and it says what it changes. */

import { el, whole } from "./dom.js";
import { beginning, encode } from "./text.js";

const MOST = 2 ** 18; // bytes: what a browser lays out at once without a pause

export class TextField {
  /** `onChange()`: there is another text. */
  constructor(onChange) {
    this.onChange = onChange;
    this.note = el("p.note", { role: "status" });
    this.element = el("textarea", {
      rows: 4,
      spellcheck: false,
      dir: "auto",
      oninput: () => this.#typed(),
      onpaste: (event) => this.#take(event, event.clipboardData),
      ondrop: (event) => this.#take(event, event.dataTransfer),
    });
  }

  get value() {
    return this.element.value;
  }

  set value(text) {
    this.element.value = text;
    this.note.textContent = "";
  }

  #typed() {
    if (!this.pasted) this.note.textContent = "";
    this.pasted = false;
    const { value } = this.element;
    const fits = beginning(value, MOST);
    if (fits.length < value.length) {
      this.element.value = fits;
      this.#tooLong();
    }
    this.onChange();
  }

  /** A text that is too long is cut before the field has to lay it out. */
  #take(event, data) {
    const text = data?.getData("text/plain") ?? "";
    this.pasted = true;
    this.note.textContent = text.includes("\r") ? "Carriage returns were left out: a browser’s text field keeps line breaks as LF (0A)." : "";
    const { value, selectionStart, selectionEnd } = this.element;
    const room = MOST - encode(value.slice(0, selectionStart) + value.slice(selectionEnd)).length;
    const fits = beginning(text, room);
    if (fits.length === text.length) return;
    event.preventDefault();
    this.pasted = false;
    this.element.setRangeText(fits, selectionStart, selectionEnd, "end");
    this.#tooLong();
    this.onChange();
  }

  #tooLong() {
    this.note.textContent = `The text is too long for the page: its first ${whole(MOST)} bytes are read.`;
  }
}
