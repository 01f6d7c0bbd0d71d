/** An error where it happened: what is wrong, and the way out. */

import { el } from "./dom.js";
import { server } from "./state.js";

const LONGEST = 15; // seconds between attempts to reach a server that is gone

/** Show an error in `place`; `again` repeats what failed, which happens by itself unless `byHand`. */
export function showProblem(place, error, again, byHand = false) {
  const parts = [el("p", {}, error.message)];
  const retry = (label) => el("button", { type: "button", onclick: () => (clearProblem(place), again()) }, label);
  switch (error.kind) {
    case "key":
      parts.push(keyForm(place, again));
      break;
    case "loading":
      waitFor(place, error.wait, again);
      place.replaceChildren(el("p.loading", { role: "status" }, error.message));
      return;
    case "busy":
      parts.push(countdown(place, error.wait, again));
      break;
    case "gone":
      parts.push(byHand ? retry("Try again") : countdown(place, longerWait(place), again));
      break;
    case "long":
      parts.push(el("p.note", {}, "Take a shorter text, or start the server with a higher limit."));
      break;
    default:
      parts.push(retry("Try again"));
  }
  place.replaceChildren(el("div.problem", { role: "alert" }, ...parts));
}

export function clearProblem(place) {
  place.replaceChildren();
}

const attempts = new WeakMap(); // by place: the last wait, and when it began

/** Seconds until the next attempt: twice the last ones', where that was just now. */
function longerWait(place) {
  const last = attempts.get(place);
  const isNew = !last || performance.now() - last.began > 1000 * (last.wait + 10);
  const wait = isNew ? 2 : Math.min(2 * last.wait, LONGEST);
  attempts.set(place, { wait, began: performance.now() });
  return wait;
}

/** Repeat after some seconds, unless something else is shown by then. */
function waitFor(place, seconds, again) {
  setTimeout(() => {
    if (place.querySelector(":scope > .loading")) again();
  }, 1000 * seconds);
}

/** A key is kept in memory only, until the page is reloaded. */
function keyForm(place, again) {
  const input = el("input", { type: "password", autocomplete: "off", required: true });
  const submit = (event) => {
    event.preventDefault();
    server.set({ key: input.value.trim() });
    clearProblem(place);
    again();
  };
  return el(
    "form.inline",
    { onsubmit: submit },
    el("label", {}, "API key, as given to blt serve; kept until the page is reloaded ", input),
    el("button", { type: "submit" }, "Use this key"),
  );
}

/** Try again when the server says so, or at once on a click. */
function countdown(place, seconds, again) {
  const button = el("button", { type: "button", onclick: () => run() });
  let left = Math.min(Math.ceil(seconds), 60);
  const show = () => (button.textContent = `Try again (by itself in ${left} s)`);
  const run = () => {
    clearInterval(timer);
    clearProblem(place);
    again();
  };
  const timer = setInterval(() => {
    left -= 1;
    if (!button.isConnected) clearInterval(timer);
    else if (left <= 0) run();
    else show();
  }, 1000);
  show();
  return button;
}
