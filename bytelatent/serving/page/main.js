/** The page: its views as tabs, which the address names, and the theme. */

import { models } from "./api.js";
import { CompareView } from "./compare.js";
import { el } from "./dom.js";
import { GenerateView } from "./generate.js";
import { PatchesView } from "./patches.js";
import { clearProblem, showProblem } from "./problems.js";
import { server, theme } from "./state.js";

const VIEWS = { patches: PatchesView, generate: GenerateView, compare: CompareView };
const tabs = [...document.querySelectorAll("[role=tab]")];
const made = {};

/** Show the view that the address names; a view is made when it is first seen. */
function show() {
  const asked = location.hash.slice(1);
  const name = asked in VIEWS ? asked : "patches";
  for (const tab of tabs) {
    const isChosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(isChosen));
    tab.tabIndex = isChosen ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = !isChosen;
  }
  made[name] ??= new VIEWS[name](document.getElementById(`view-${name}`));
  document.title = `bytelatent: ${name}`;
}

function moveBetweenTabs(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const at = tabs.indexOf(event.currentTarget);
  const to = event.key === "Home" ? 0 : event.key === "End" ? tabs.length - 1 : (at + step + tabs.length) % tabs.length;
  if (Number.isNaN(to)) return;
  event.preventDefault();
  tabs[to].focus();
  location.hash = tabs[to].id.slice("tab-".length);
}

for (const tab of tabs) {
  tab.addEventListener("click", () => (location.hash = tab.id.slice("tab-".length)));
  tab.addEventListener("keydown", moveBetweenTabs);
}
addEventListener("hashchange", show);

const choice = document.getElementById("theme");
choice.value = theme.get("choice");
choice.addEventListener("change", () => theme.set({ choice: choice.value }));

/** Ask for the models; the views are made once they are known, or once the problem is shown. */
async function begin() {
  const problem = document.getElementById("problem");
  clearProblem(problem);
  try {
    server.set({ models: await models() });
    const names = server.get("models").map((name) => el("span", { title: name }, name.startsWith("/") ? name.split("/").pop() : name));
    document.getElementById("model").replaceChildren(...names);
  } catch (error) {
    showProblem(problem, error, begin);
    return;
  }
  show();
}

begin();
