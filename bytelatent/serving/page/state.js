/** What the views share. The theme is stored; texts and settings last as long as the tab, the key until a reload. */

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
export const theme = new Store({ choice: stored("localStorage", THEME) ?? "system" });

theme.subscribe(({ choice }) => {
  document.documentElement.dataset.theme = choice;
  store("localStorage", THEME, choice);
});

/** What was kept under a name in this tab, else null. */
export const kept = (name) => JSON.parse(stored("sessionStorage", `bytelatent.${name}`));

/** Keep a value over a reload. */
export const keep = (name, value) => store("sessionStorage", `bytelatent.${name}`, JSON.stringify(value));

// Storage may be switched off or full; values then last until a reload.

function store(storage, name, value) {
  try {
    globalThis[storage].setItem(name, value);
  } catch {
    stored(storage, name, true);
  }
}

function stored(storage, name, isOld = false) {
  try {
    if (isOld) globalThis[storage].removeItem(name);
    return globalThis[storage].getItem(name);
  } catch {
    return null;
  }
}
