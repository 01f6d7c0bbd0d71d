/** The threshold as a bar in the line of entropies: dragged with the pointer, or moved with the arrow keys. */

import { decimal, el } from "./dom.js";

const NEAR = 6; // pixels from the line at which the pointer takes it
const STEPS = { ArrowUp: 0.05, ArrowRight: 0.05, ArrowDown: -0.05, ArrowLeft: -0.05, PageUp: 0.5, PageDown: -0.5 };

export class ThresholdBar {
  /** `drawing`: a PatchedText. `onChange(threshold)`: it was moved. */
  constructor(drawing, onChange) {
    this.drawing = drawing;
    this.onChange = onChange;
    this.value = null;
    this.handle = el("div.threshold-handle", {
      role: "slider",
      tabIndex: 0,
      "aria-label": "Threshold",
      "aria-orientation": "vertical",
      "aria-valuemin": "0",
      onkeydown: (event) => this.#key(event),
      hidden: true,
    });
    const { host } = drawing;
    host.append(this.handle);
    drawing.axis.onPlace = (y) => this.#place(y);
    host.addEventListener("pointerdown", (event) => this.#down(event));
    host.addEventListener("pointermove", (event) => this.#hover(event));
  }

  /** Show a threshold; null: there is none to move. */
  show(value) {
    this.value = value;
    this.handle.hidden = value === null;
    if (value === null) return;
    const { top } = this.drawing.marks;
    this.handle.textContent = decimal(value);
    this.handle.setAttribute("aria-valuemax", decimal(top));
    this.handle.setAttribute("aria-valuenow", decimal(value));
    this.handle.setAttribute("aria-valuetext", `${decimal(value)} nats`);
    this.drawing.axis.place();
  }

  /** The handle is beside the first row in sight, over the scale's 0 where it has to be. */
  #place(y) {
    if (this.value === null) return;
    const at = this.drawing.yOf(this.value);
    this.handle.style.top = `${y + at}px`;
    if (at > this.drawing.geometry.lane - 18) this.drawing.axis.ends[1].hidden = true;
  }

  /** How far the pointer is from the line of its row, and its height in that row. */
  #at(event) {
    const { row, first } = this.drawing.geometry;
    const { host } = this.drawing;
    const y = event.clientY - host.getBoundingClientRect().top - host.clientTop + host.scrollTop - first;
    const height = ((y % row) + row) % row;
    return { height, rowTop: y - height, y, distance: Math.abs(height - this.drawing.yOf(this.value)) };
  }

  #takes(event) {
    if (this.value === null || !this.drawing.bytes.length) return false;
    if (event.target === this.handle) return true;
    return event.pointerType === "mouse" && event.target.closest(".block") && this.#at(event).distance <= NEAR;
  }

  #hover(event) {
    this.drawing.host.classList.toggle("at-threshold", !this.dragging && Boolean(this.#takes(event)));
  }

  #down(event) {
    if (event.button !== 0 || !this.#takes(event)) return;
    event.preventDefault();
    this.handle.focus({ preventScroll: true });
    const { host } = this.drawing;
    const start = this.#at(event);
    const rowTop = event.target === this.handle ? start.y - this.drawing.yOf(this.value) : start.rowTop;
    this.dragging = true;
    host.setPointerCapture(event.pointerId);
    host.classList.add("dragging");
    const move = (moved) => this.#set(this.drawing.valueAt(this.#at(moved).y - rowTop));
    const up = () => {
      this.dragging = false;
      host.classList.remove("dragging");
      host.removeEventListener("pointermove", move);
      host.removeEventListener("pointerup", up);
      host.removeEventListener("pointercancel", up);
    };
    host.addEventListener("pointermove", move);
    host.addEventListener("pointerup", up);
    host.addEventListener("pointercancel", up);
  }

  #key(event) {
    const { top } = this.drawing.marks;
    const to = event.key === "Home" ? 0 : event.key === "End" ? top : this.value + STEPS[event.key];
    if (!Number.isFinite(to)) return;
    event.preventDefault();
    event.stopPropagation();
    this.#set(Math.max(0, Math.min(top, to)));
  }

  #set(value) {
    this.onChange(Math.round(value * 100) / 100);
  }
}
