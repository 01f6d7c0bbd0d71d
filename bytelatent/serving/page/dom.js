/** Small pieces of HTML. Text only ever becomes a text node, so that no text of a user or a model is read as HTML. */

/**
 * Make an element: `el("button.primary", {type: "button", onclick: run}, "Run")`.
 * Properties that begin with `on` are listeners; those with a dash, `role` and `for` are attributes.
 */
export function el(kind, properties = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Make an element of SVG. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const WHOLE = new Intl.NumberFormat("en");

/** A whole number with separators. */
export const whole = (value) => WHOLE.format(value);

/** A number with a fixed number of decimals; a dash where there is none. */
export const decimal = (value, digits = 2) => (Number.isFinite(value) ? value.toFixed(digits) : "–");

/** A share as a percentage, with a true minus. */
export const percent = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(0)} %`.replace("-", "−") : "–");

/** `1 byte`, `2 bytes`, `1 patch`, `2 patches`. */
export const plural = (count, noun) => `${whole(count)} ${noun}${count === 1 ? "" : noun.endsWith("ch") ? "es" : "s"}`;

/** Call `action` at most once per frame, with the newest arguments. */
export function oncePerFrame(action) {
  let waiting = null;
  return (...given) => {
    if (waiting === null) {
      requestAnimationFrame(() => {
        const newest = waiting;
        waiting = null;
        action(...newest);
      });
    }
    waiting = given;
  };
}
