/** An error where it happened: what is wrong, and the way out. */

import { el } from "./dom.js";
import { server } from "./state.js";

/** Show an error in `place`; `again` repeats what failed. */
export function showProblem(place, error, again) {
  const parts = [el("p", {}, error.message)];
  const retry = (label) => el("button", { type: "button", onclick: () => (clearProblem(place), again()) }, label);
  switch (error.kind) {
    case "key":
      parts.push(keyForm(place, again));
      break;
    case "busy":
      parts.push(countdown(place, error.wait, again));
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

/** A key is kept in memory only, until the tab is closed. */
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
    el("label", {}, "API key, as given to blt serve; kept until this tab is closed ", input),
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
