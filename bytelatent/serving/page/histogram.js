/** How many bytes have which entropy, with the threshold between those that start a patch and those that do not. */

import { decimal, el, oncePerFrame, percent, svg } from "./dom.js";

const BARS = 44;
const HEIGHT = 56;

export class Histogram {
  /** `onChange(threshold)`: the bar was moved. */
  constructor(onChange) {
    this.bars = Array.from({ length: BARS }, (_, i) => svg("rect", { x: i + 0.1, width: 0.8, y: HEIGHT, height: 0 }));
    this.slider = el("input", {
      type: "range",
      min: 0,
      step: 0.01,
      "aria-label": "Threshold, over the histogram",
      oninput: () => onChange(Number(this.slider.value)),
    });
    this.caption = el("p.note");
    const picture = svg("svg", { viewBox: `0 0 ${BARS} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    picture.append(...this.bars);
    this.line = el("div.cut", { "aria-hidden": "true" });
    const plot = el("div.plot", {}, picture, this.line);
    this.element = el("div.histogram", {}, plot, this.slider, this.caption);
    this.draw = oncePerFrame((...given) => this.#draw(...given));
  }

  #draw(values, top, threshold) {
    this.slider.max = top;
    this.slider.value = threshold;
    this.slider.setAttribute("aria-valuetext", `${decimal(threshold)} nats`);
    const counts = new Float64Array(BARS);
    let above = 0;
    let all = 0;
    for (const value of values) {
      if (!Number.isFinite(value)) continue;
      counts[Math.min(Math.floor((value / top) * BARS), BARS - 1)]++;
      all++;
      if (value > threshold) above++;
    }
    const most = Math.max(...counts, 1);
    this.bars.forEach((bar, i) => {
      const height = counts[i] ? Math.max(1, (HEIGHT - 2) * Math.sqrt(counts[i] / most)) : 0;
      bar.setAttribute("y", HEIGHT - height);
      bar.setAttribute("height", height);
      bar.setAttribute("class", ((i + 0.5) / BARS) * top > threshold ? "above" : "below");
    });
    this.line.style.left = `${(100 * threshold) / top}%`;
    this.caption.textContent = !all ? "" : `${percent(above / all)} of the bytes lie above ${decimal(threshold)} nats.`;
  }
}
