/** The server's API: each call is one function; what goes wrong becomes an `ApiError` in plain words. */

import { server } from "./state.js";

/**
 * Something went wrong, and what can be done.
 * `kind`: `gone`, `loading`, `key`, `busy`, `long` or `refused`; `wait`: seconds after which to try again.
 */
export class ApiError extends Error {
  constructor(kind, message, wait = 0) {
    super(message);
    this.kind = kind;
    this.wait = wait;
  }
}

/** Whether an error only says that we ended the request ourselves. */
export const isStop = (error) => error instanceof DOMException && error.name === "AbortError";

/** Names of the models, the first is the default. */
export async function models() {
  const answer = await (await send("v1/models")).json();
  return answer.data.map((model) => model.id);
}

/** Patches of a text: `{bytes, entropies, starts, mode, modes, patching, threshold, flops}`. */
export async function patches(text, model, signal) {
  const response = await send("v1/patches", { text, model, modes: ["space"], patches: false }, signal);
  return response.json();
}

/**
 * Stream a completion, or a chat where `body` has messages.
 * Yields `{bytes, logprobs, starts, alternatives, ended}`: values per new byte, and why the text ended or null.
 */
export async function* complete(body, signal) {
  const path = body.messages ? "v1/chat/completions" : "v1/completions";
  const response = await send(path, { ...body, stream: true, bytelatent: true }, signal);
  for await (const event of events(response.body)) {
    if (event.error) throw new ApiError("refused", event.error.message);
    const choice = event.choices?.[0];
    if (!choice) continue;
    const about = event.bytelatent ?? { bytes: [], logprobs: [], starts: [], alternatives: [] };
    yield { ...about, ended: choice.finish_reason ?? null };
  }
}

/** The JSON of each server-sent event, up to `[DONE]`. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ApiError("gone", "The connection ended before the text did.");
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } catch (error) {
    throw error instanceof TypeError ? new ApiError("gone", "The connection to the server broke.") : error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function send(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const key = server.get("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (isStop(error)) throw error;
    throw new ApiError("gone", "The server does not answer. Is `blt serve` still running?");
  }
  if (!response.ok) throw await problem(response);
  return response;
}

async function problem(response) {
  let message = `The server answered with status ${response.status}.`;
  let code = null;
  try {
    const { error } = await response.json();
    ({ message, code } = error);
  } catch {
    // Not our server's error; the status is all there is.
  }
  switch (response.status) {
    case 401:
    case 403:
      return new ApiError("key", server.get("key") ? "The server does not know this key." : "This server needs a key.");
    case 429:
    case 503: {
      const wait = Number(response.headers.get("Retry-After")) || 1;
      if (code === "model_loading") return new ApiError("loading", "The model is loading …", wait);
      return new ApiError("busy", response.status === 429 ? "The server is busy: its queue is full." : "The server takes no requests now.", wait);
    }
    case 413:
      return new ApiError("long", `The text is too long: ${message}`);
    default:
      return new ApiError(code === "context_length_exceeded" ? "long" : "refused", message);
  }
}
