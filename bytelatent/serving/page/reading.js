/** A text as the server reads it: piece by piece, so that a long one shows its beginning at once. */

import { isStop, patches } from "./api.js";
import { entropyStarts, flags, staticStarts, UNKNOWN } from "./starts.js";
import { cut, encode } from "./text.js";

const PIECE = { least: 3072, most: 4096 }; // bytes that are read at once
const REMEMBERED = 512; // pieces whose answers are kept, so that a change costs only what changed

export class Reading {
  #answers = new Map();
  #abort = null;
  #decoder = new TextDecoder();

  /** `onChange()`: another piece has been read. */
  constructor(onChange) {
    this.onChange = onChange;
    this.bytes = new Uint8Array();
    this.pieces = [];
    this.about = null; // what holds for every piece: its mode, settings, threshold, FLOPs
    this.made = {}; // entropies and flags that were asked for, until another piece is read
  }

  /** Whether each piece has been read. */
  get isDone() {
    return this.pieces.every((piece) => piece.answer);
  }

  /** Bytes that have been read. */
  get numRead() {
    return this.pieces.reduce((sum, { from, to, answer }) => sum + (answer ? to - from : 0), 0);
  }

  /** Change the text at once; `read` then asks the server. */
  setText(text) {
    this.#abort?.abort();
    this.made = {};
    this.bytes = encode(text);
    this.pieces = cut(this.bytes, PIECE.least, PIECE.most).map(([from, to]) => {
      const string = this.#decoder.decode(this.bytes.subarray(from, to));
      return { from, to, string, answer: this.#answers.get(string) ?? null };
    });
  }

  /** Read what is not known yet. Raises ApiError; a newer text ends an older one's reading without one. */
  async read(model) {
    const abort = (this.#abort = new AbortController());
    try {
      for (const piece of this.pieces) {
        piece.answer ??= this.#remember(piece.string, await patches(piece.string, model, abort.signal));
        if (abort.signal.aborted) return;
        this.about = piece.answer;
        this.made = {};
        this.onChange();
      }
    } catch (error) {
      if (!isStop(error)) throw error;
    }
  }

  #remember(string, answer) {
    answer.values = answer.entropies && Float32Array.from(answer.entropies);
    if (this.#answers.size >= REMEMBERED) this.#answers.delete(this.#answers.keys().next().value);
    this.#answers.set(string, answer);
    return answer;
  }

  /** Entropies of all bytes, NaN where they are not known; null where the model has none. */
  entropies() {
    if (!this.about?.values) return null;
    if (!this.made.entropies) {
      const all = (this.made.entropies = new Float32Array(this.bytes.length).fill(NaN));
      for (const { from, answer } of this.pieces) if (answer) all.set(answer.values, from);
    }
    return this.made.entropies;
  }

  /** Flags of the model's own mode, with another threshold where it takes one. */
  own(threshold) {
    return this.#each(`own ${threshold}`, (answer, size) =>
      answer.values ? entropyStarts(answer.values, answer.patching, threshold) : flags(answer.starts, size),
    );
  }

  /** Flags of static patches. */
  static(size) {
    return this.#each(`static ${size}`, (answer, length) => staticStarts(length, size));
  }

  /** Flags of a mode that the server has found. */
  mode(name) {
    return this.#each(name, (answer, size) => flags(answer.modes[name].starts, size));
  }

  #each(key, starts) {
    const mode = key.split(" ")[0]; // of each mode the last flags are kept
    if (this.made[mode]?.key !== key) {
      const all = new Uint8Array(this.bytes.length).fill(UNKNOWN);
      for (const { from, to, answer } of this.pieces) if (answer) all.set(starts(answer, to - from), from);
      this.made[mode] = { key, all };
    }
    return this.made[mode].all;
  }
}
