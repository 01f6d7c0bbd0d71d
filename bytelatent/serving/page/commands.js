/** The same request as a command that can be run: with curl, and with OpenAI's Python client. */

import { el } from "./dom.js";
import { server } from "./state.js";

/** For a shell: in single quotes, in which only they mean something. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** JSON's texts and numbers are Python's as well. */
const literal = (value) => JSON.stringify(value);

const NEEDS_KEY = "BLT_API_KEY"; // the variable that commands read a key from: a key itself is never shown

export function asCurl(body, base) {
  const path = body.messages ? "/v1/chat/completions" : "/v1/completions";
  const lines = [`curl -sN ${quoted(base + path)}`, "  -H 'Content-Type: application/json'"];
  if (server.get("key")) lines.push(`  -H "Authorization: Bearer $${NEEDS_KEY}"`);
  lines.push(`  -d ${quoted(JSON.stringify({ ...body, stream: true }))}`);
  return lines.join(" \\\n");
}

export function asPython(body, base) {
  const key = server.get("key") ? `os.environ["${NEEDS_KEY}"]` : '"none"';
  const [call, text] = body.messages
    ? ["client.chat.completions.create", 'chunk.choices[0].delta.content or ""']
    : ["client.completions.create", "chunk.choices[0].text"];
  const values = Object.entries({ model: server.get("models")[0] ?? "blt", ...body });
  return [
    ...(server.get("key") ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${base}/v1`)}, api_key=${key})`,
    `stream = ${call}(`,
    ...values.map(([name, value]) => `    ${name}=${literal(value)},`),
    "    stream=True,",
    ")",
    "for chunk in stream:",
    `    print(${text}, end="", flush=True)`,
    "",
  ].join("\n");
}

/** A closed part of the page with both commands; `request()` gives the body at the time it is opened or copied. */
export function commandsOf(request) {
  const base = () => location.origin + location.pathname.replace(/\/[^/]*$/, "");
  const shown = [
    ["curl", asCurl],
    ["Python", asPython],
  ].map(([name, write]) => {
    const text = el("pre", { tabIndex: 0, role: "region", "aria-label": `The request with ${name}` });
    const done = el("span.note", { role: "status" });
    const fill = () => (text.textContent = write(request(), base()));
    const copy = async () => {
      fill();
      details.open = true;
      try {
        await navigator.clipboard.writeText(text.textContent);
        done.textContent = "Copied.";
      } catch {
        getSelection().selectAllChildren(text);
        done.textContent = "Selected; press Ctrl+C.";
      }
    };
    const button = el("button", { type: "button", onclick: copy }, `Copy as ${name}`);
    return { fill, element: el("div.command", {}, el("div.row", {}, button, done), text) };
  });
  const fillAll = () => shown.forEach(({ fill }) => fill());
  const details = el("details", { ontoggle: fillAll }, el("summary", {}, "This request as a command"));
  details.append(...shown.map(({ element }) => element));
  return { element: details, refresh: () => details.open && fillAll() };
}
