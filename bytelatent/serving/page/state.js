/** What the views share. Nothing is stored but the theme: texts and the key are forgotten with the tab. */

/** Values that others are called about when they change. */
export class Store {
  #listeners = [];

  constructor(values) {
    this.values = values;
  }

  get(name) {
    return this.values[name];
  }

  set(changes) {
    Object.assign(this.values, changes);
    for (const listener of this.#listeners) listener(this.values);
  }

  /** Call `listener` now and at each change. */
  subscribe(listener) {
    this.#listeners.push(listener);
    listener(this.values);
  }
}

/** `models`: names that the server gives; `key`: an API key, in memory only. */
export const server = new Store({ models: [], key: "" });

const THEME = "bytelatent.theme";

/** `system`, `light` or `dark`. */
export const theme = new Store({ choice: stored(THEME) ?? "system" });

theme.subscribe(({ choice }) => {
  document.documentElement.dataset.theme = choice;
  try {
    localStorage.setItem(THEME, choice);
  } catch {
    // Storage may be switched off; the theme then lasts as long as the tab.
  }
});

function stored(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}
