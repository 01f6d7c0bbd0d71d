/** Bytes as characters: what is shown of them, and where a long text may be cut. */

const LF = 0x0a;
const SPACE = 0x20;
const INVISIBLE = /[\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\u0080-\u009f\u00ad]/; // joiners keep their effect
const BLANK = /[\u00a0\u115f\u1160\u1680\u180e\u2000-\u200a\u202f\u205f\u2800\u3000\u3164\uffa0]/; // no plain space
const PLAIN = /^[\x20-\x7e\n↵⇥␀-␡]*$/;
const PIECES = globalThis.Intl?.Segmenter ? new Intl.Segmenter(undefined, { granularity: "grapheme" }) : null;

/** UTF-8 of a text; half a surrogate pair, which no text may hold, becomes U+FFFD. */
export const encode = (text) => new TextEncoder().encode(text);

/** The beginning of a text, of at most this number of bytes; whole characters. */
export function beginning(text, most) {
  if (3 * text.length <= most) return text; // a UTF-16 unit has at most 3 bytes
  return text.slice(0, new TextEncoder().encodeInto(text, new Uint8Array(Math.max(0, most))).read);
}

const isContinuation = (byte) => (byte & 0xc0) === 0x80;

/**
 * Cut bytes into ranges `[from, to]` of about `least` to `most` bytes: after a line, else after a space, else
 * between characters.
 */
export function cut(bytes, least, most, lines = Infinity) {
  const ranges = [];
  let from = 0;
  while (from < bytes.length) {
    const to = endOf(bytes, from, least, most, lines);
    ranges.push([from, to]);
    from = to;
  }
  return ranges;
}

function endOf(bytes, from, least, most, lines) {
  const last = Math.min(from + most, bytes.length);
  let space = 0;
  let numLines = 0;
  for (let i = from; i < last; i++) {
    if (bytes[i] === LF && (++numLines >= lines || i + 1 - from >= least)) return i + 1;
    // A space may carry a combining mark; before an ASCII byte it does not.
    if (bytes[i] === SPACE && i + 1 - from >= least && bytes[i + 1] < 0x80) space = i + 1;
  }
  if (last === bytes.length) return last;
  if (space) return space;
  let end = last;
  while (end > from + 1 && isContinuation(bytes[end])) end--;
  return end;
}

/**
 * What is shown of bytes `from` to `to`: `{shown, at}`, a string and for each of its UTF-16 units the byte it is of.
 * Line breaks, controls and marks that would not be seen get a sign; a byte that is no UTF-8 becomes U+FFFD.
 */
export function decode(bytes, from, to) {
  let shown = "";
  const at = [];
  for (let i = from; i < to; ) {
    const [code, size] = codePoint(bytes, i, to);
    const text = sign(code);
    shown += text;
    for (let unit = 0; unit < text.length; unit++) at.push(i);
    i += size;
  }
  return { shown, at };
}

/** The code point at a byte, -1 where there is no UTF-8, and its size in bytes. */
export function codePoint(bytes, at, end) {
  const first = bytes[at];
  if (first < 0x80) return [first, 1];
  const size = first >= 0xf0 && first <= 0xf4 ? 4 : first >= 0xe0 && first < 0xf0 ? 3 : first >= 0xc2 && first < 0xe0 ? 2 : 0;
  if (!size || at + size > end) return [-1, 1];
  let code = first & (0x7f >> size);
  for (let i = at + 1; i < at + size; i++) {
    if (!isContinuation(bytes[i])) return [-1, 1];
    code = (code << 6) | (bytes[i] & 0x3f);
  }
  const isShortest = code >= (size === 2 ? 0x80 : size === 3 ? 0x800 : 0x10000);
  const isSurrogate = code >= 0xd800 && code <= 0xdfff;
  return isShortest && !isSurrogate && code <= 0x10ffff ? [code, size] : [-1, 1];
}

function sign(code) {
  if (code === LF) return "↵\n";
  if (code === 0x09) return "⇥";
  if (code < 0) return "\ufffd";
  if (code < 0x20) return String.fromCharCode(0x2400 + code);
  if (code === 0x7f) return "␡";
  const text = String.fromCodePoint(code);
  return INVISIBLE.test(text) ? "◦" : BLANK.test(text) ? "␣" : text;
}

/** Where each grapheme of a shown text begins, in UTF-16 units, and its end. */
export function graphemes(shown) {
  const begins = [];
  if (PLAIN.test(shown)) for (let i = 0; i < shown.length; i++) begins.push(i);
  else if (PIECES) for (const { index } of PIECES.segment(shown)) begins.push(index);
  else for (let i = 0; i < shown.length; i += shown.codePointAt(i) > 0xffff ? 2 : 1) begins.push(i);
  // A line break belongs to its sign.
  return [...begins.filter((at) => shown[at] !== "\n"), shown.length];
}

/** How a byte is written: a character where it is one of ASCII, else its value. */
export function byteName(byte) {
  if (byte === null) return "end";
  if (byte === SPACE) return "space";
  if (byte < 0x80) return sign(byte)[0];
  return hex(byte);
}

export const hex = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");

/** `U+0041` for each code point of some bytes. */
export function codePoints(bytes) {
  const names = [];
  for (let i = 0; i < bytes.length; ) {
    const [code, size] = codePoint(bytes, i, bytes.length);
    names.push(code < 0 ? "no UTF-8" : `U+${code.toString(16).toUpperCase().padStart(4, "0")}`);
    i += size;
  }
  return names;
}

/** The number of characters: code points, and bytes that are part of none. */
export function countCharacters(bytes) {
  let sum = 0;
  for (const byte of bytes) sum += isContinuation(byte) ? 0 : 1;
  return sum;
}
