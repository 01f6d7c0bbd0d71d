/** One text as it is generated: streamed, drawn with its patches, and summed up. */

import { complete, isStop } from "./api.js";
import { decimal, el, oncePerFrame, plural } from "./dom.js";
import { PatchedText } from "./drawing.js";
import { probability } from "./inspector.js";
import { clearProblem, showProblem } from "./problems.js";

const TOP = 6; // nats at the top of the line: a probability of 0.25 %
const ENDS = { stop: "The text ended.", length: "Reached the number of bytes asked for." };

export class Generation {
  /** `label`: of the text; `inspector`: shows a byte's probability and alternatives. */
  constructor(label, inspector) {
    this.inspector = inspector;
    this.text = el("div");
    this.status = el("p.note.status", { role: "status" });
    this.problem = el("div");
    this.element = el("div.generation", {}, this.text, this.status, this.problem);
    this.drawing = new PatchedText(this.text, { label, onInspect: (what) => this.#inspect(what) });
    this.draw = oncePerFrame(() => this.#draw());
    this.#clear();
  }

  get isRunning() {
    return this.abort !== null && this.abort !== undefined;
  }

  /** The generated text. */
  get string() {
    return new TextDecoder().decode(Uint8Array.from(this.bytes));
  }

  /** Run a request; returns whether it came to its end. */
  async run(body) {
    this.stop();
    this.#clear();
    clearProblem(this.problem);
    const abort = (this.abort = new AbortController());
    const began = performance.now();
    this.status.textContent = "Waiting for the first byte …";
    this.element.setAttribute("aria-busy", "true");
    try {
      for await (const chunk of complete(body, abort.signal)) {
        if (abort.signal.aborted) break;
        this.#add(chunk, began);
      }
      if (this.abort === abort) this.#sum(abort.signal.aborted ? "Stopped." : (ENDS[this.ended] ?? "The text ended."));
      return !abort.signal.aborted;
    } catch (error) {
      if (this.abort !== abort && this.abort !== null) return false;
      if (isStop(error)) this.#sum("Stopped.");
      else {
        this.#sum("");
        // What has come is not thrown away unasked.
        showProblem(this.problem, error, () => this.run(body), this.bytes.length > 0);
      }
      return false;
    } finally {
      if (this.abort === abort) this.abort = null;
      this.element.removeAttribute("aria-busy");
      this.onEnd?.();
    }
  }

  stop() {
    this.abort?.abort();
  }

  /** Mean -log2 p of the bytes; what this text costs. */
  get bitsPerByte() {
    const sum = this.logprobs.reduce((total, value) => total - value, 0);
    return sum / Math.LN2 / this.logprobs.length;
  }

  #clear() {
    Object.assign(this, { bytes: [], logprobs: [], starts: [], alternatives: [], ended: null, seconds: 0 });
    this.drawing.selected = null;
    this.inspector.clear();
    this.#draw();
  }

  #add(chunk, began) {
    for (const name of ["bytes", "logprobs", "starts", "alternatives"]) this[name].push(...chunk[name]);
    this.ended = chunk.ended ?? this.ended;
    this.seconds = (performance.now() - began) / 1000;
    if (chunk.bytes.length) this.draw();
  }

  #draw() {
    const { drawing } = this;
    const isAtEnd = drawing.host.scrollTop + drawing.host.clientHeight > drawing.host.scrollHeight - 40;
    drawing.setBytes(Uint8Array.from(this.bytes));
    const values = Float32Array.from(this.logprobs, (value) => Math.min(-value, TOP));
    drawing.setMarks({ values, top: TOP, starts: Uint8Array.from(this.starts, Number) });
    if (isAtEnd) drawing.host.scrollTop = drawing.host.scrollHeight;
    if (this.isRunning && this.bytes.length) this.status.textContent = `${plural(this.bytes.length, "byte")} …`;
  }

  #sum(end) {
    const size = this.bytes.length;
    const patches = this.starts.filter(Boolean).length;
    const speed = this.seconds > 0 ? `, ${decimal(size / this.seconds, 0)} bytes/s` : "";
    const facts = `${plural(size, "byte")}, ${plural(patches, "patch")}, ${decimal(this.bitsPerByte)} bits per byte${speed}.`;
    this.status.textContent = size ? `${end} ${facts}` : end && `${end} There is no text.`;
  }

  #inspect({ from, to, byUser }) {
    const numbers = [];
    let patch = 0;
    for (const starts of this.starts) numbers.push((patch += starts ? 1 : 0));
    const number = numbers[from];
    return this.inspector.show({
      bytes: Uint8Array.from(this.bytes.slice(from, to)),
      from,
      columns: ["probability"],
      rows: this.logprobs.slice(from, to).map((value) => [probability(value)]),
      patch: number ? { number, count: patch, size: numbers.filter((each) => each === number).length } : null,
      alternatives: this.alternatives.slice(from, to),
      byUser,
    });
  }
}
