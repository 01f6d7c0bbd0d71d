/** Where patches start, from entropies: the same decisions as `bytelatent/patching/modes.py`, and their cost. */

/**
 * A flag for each byte of one text that was read on its own.
 *
 * `entropies` is a Float32Array; entropy i is about byte i before it is read, and position i is that of the id before
 * it, BOS being 0. All arithmetic is in float32, as in the model.
 */
export function entropyStarts(entropies, patching, threshold) {
  const limit = Math.fround(threshold);
  const add = Math.fround(patching.threshold_add ?? 0);
  const decide = {
    threshold: (i, entropy) => i === 0 || entropy > limit,
    rise: (i, entropy, rise) => i <= 1 || rise > limit,
    combined: (i, entropy, rise) => i <= 1 || (i !== 2 && entropy > limit && rise > add),
  }[patching.decision];
  const starts = new Uint8Array(entropies.length);
  let before = 0;
  for (let i = 0; i < entropies.length; i++) {
    starts[i] = decide(i, entropies[i], Math.fround(entropies[i] - before)) ? 1 : 0;
    before = entropies[i];
  }
  return patching.max_patch_length ? split(starts, patching.max_patch_length) : starts;
}

/** Static patches, of one size: BOS is in the first patch, so that it has a byte less. */
export function staticStarts(length, size) {
  const starts = new Uint8Array(length);
  for (let i = 0; i < length; i++) starts[i] = i === 0 || (i + 1) % size === 0 ? 1 : 0;
  return starts;
}

/** Flags from offsets of bytes. */
export function flags(offsets, length) {
  const starts = new Uint8Array(length);
  for (const at of offsets) starts[at] = 1;
  return starts;
}

/** Split long patches from their start; ids are counted, so that BOS is one. */
function split(natural, most) {
  const starts = natural.slice();
  let last = 0; // the id at which the mode itself last started a patch
  for (let i = 0; i < natural.length; i++) {
    if (i > 0 && natural[i - 1]) last = i;
    if ((i + 1 - last) % most === 0) starts[i] = 1;
  }
  return starts;
}

/** How many flags are 1. */
export function count(starts) {
  let sum = 0;
  for (const flag of starts) sum += flag === 1 ? 1 : 0;
  return sum;
}

/** The share of a forward pass's FLOPs that patches save, against one patch per byte; `flops` is the server's. */
export function flopsSaved(flops, numBytes, numPatches, byEntropy) {
  const steps = flops.per_byte.length - 1;
  const share = (numPatches / numBytes) * steps;
  const below = Math.min(Math.floor(share), steps - 1);
  const [low, high] = [flops.per_byte[below], flops.per_byte[below + 1]];
  const needed = low + (high - low) * (share - below) + (byEntropy ? flops.entropy_model : 0);
  return 1 - needed / flops.per_byte[steps];
}

/** A flag of a byte of which it is not known yet whether it starts a patch. */
export const UNKNOWN = 2;

/** The number of the patch that each byte is in, 0 in one that began before the text; -1 where it is not known. */
export function numbered(starts) {
  const numbers = new Int32Array(starts.length);
  let patch = 0;
  for (let i = 0; i < starts.length; i++) {
    if (starts[i] === 1) patch++;
    numbers[i] = starts[i] === UNKNOWN ? -1 : patch;
  }
  return numbers;
}
