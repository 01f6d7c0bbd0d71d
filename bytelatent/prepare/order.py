"""The shuffled order: documents by a random key of 64 bits.

A document's key comes from the seed and its place in the input (or, to remove duplicates, from its text), so that the
order depends on neither the memory nor the number of workers. 2^64 keys for 10^9 documents: two share one with
probability 0.03, and then the first in the input goes first.
"""

# Shapes: N documents

import hashlib

import numpy as np

KEY_BITS = 64


class PlaceKeys:
    """Random keys for the documents of a unit, in their order."""

    def __init__(self, seed: int, unit: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence([seed, unit]))

    def draw(self, count: int) -> np.ndarray:
        """The next `count` keys, uint64 [N]; the same however the documents are divided into calls."""
        return self._bits.random_raw(count)


class TextKeys:
    """Random keys that are the same for the same text: 128 bits, of which the order needs the high 64."""

    def __init__(self, seed: int) -> None:
        self._hash = hashlib.blake2b(digest_size=16, key=seed.to_bytes(8, "big"))

    def key(self, text: bytes) -> bytes:
        """16 bytes, the most significant first."""
        keyed = self._hash.copy()
        keyed.update(text)
        return keyed.digest()


def split_keys(keys: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The high and the low 64 bits of keys of 16 bytes, uint64 [N] each."""
    both = np.frombuffer(b"".join(keys), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])


def sorted_order(high: np.ndarray, low: np.ndarray | None = None) -> np.ndarray:
    """The positions of the documents by key, int64 [N]; those with one key stay in the order given."""
    if low is not None:
        return np.lexsort((low, high))
    order = np.argsort(high)
    in_order = high[order]
    if (in_order[1:] == in_order[:-1]).any():  # so rare that the quicker sort, which is not stable, goes first
        return np.argsort(high, kind="stable")
    return order


def first_of_each(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Where sorted keys are not those of the document before, bool [N]."""
    first = np.ones(len(high), dtype=bool)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return first


def bin_of(high: np.ndarray, bits: int) -> np.ndarray:
    """The bin of each key, int64 [N]: its `bits` highest bits."""
    return (high >> np.uint64(KEY_BITS - bits)).astype(np.int64)


def bin_edges(sorted_high: np.ndarray, bits: int) -> np.ndarray:
    """How many of the sorted keys lie before each bin, int64 [2^bits + 1]."""
    first_keys = np.arange(1 << bits, dtype=np.uint64) << np.uint64(KEY_BITS - bits)
    return np.append(np.searchsorted(sorted_high, first_keys), len(sorted_high)).astype(np.int64)
