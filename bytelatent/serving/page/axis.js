/** The scale of the line of values, beside the first row in sight. */

import { el, oncePerFrame } from "./dom.js";

export class Axis {
  /** `drawing`: a PatchedText. */
  constructor(drawing) {
    this.drawing = drawing;
    this.ends = ["top", "zero"].map((end) => el(`div.axis.${end}`, { "aria-hidden": "true" }));
    drawing.host.append(...this.ends);
    drawing.host.addEventListener("scroll", oncePerFrame(() => this.place()), { passive: true });
  }

  place() {
    const { bytes, marks, geometry } = this.drawing;
    const [top, zero] = this.ends;
    for (const end of this.ends) end.hidden = !marks.values || !bytes.length;
    top.textContent = `${marks.top} nats`;
    zero.textContent = "0";
    const y = firstInSight(this.drawing);
    top.style.top = `${y}px`;
    zero.style.top = `${y + geometry.lane}px`;
    this.onPlace?.(y);
  }
}

/** Where the first row begins of which the lane and the label above it are in sight. */
function firstInSight({ geometry: { row, first }, host }) {
  return first + row * Math.max(0, Math.ceil((host.scrollTop + 12 - first) / row));
}
