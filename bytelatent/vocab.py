"""Ids and bytes: four special ids, then the 256 byte values.

Byte `b` is id `b + 4`. A document is BOS, its bytes, EOS. Any byte string is a valid document: nothing here
assumes UTF-8.
"""

import numpy as np

from bytelatent.errors import UserError

BOE, BOS, EOS, BPE_DELIMITER = 0, 1, 2, 3
OFFSET = 4
VOCAB_SIZE = OFFSET + 256
PADDING = -1  # fills ragged rows of ids; never embedded


def to_bytes(text: str | bytes) -> bytes:
    """UTF-8; bytes as they are. Surrogates that stand for undecodable bytes become those bytes again, others pass.

    Raises:
        UserError: it is neither str nor bytes.
    """
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise UserError(f"a text is str or bytes, not {type(text).__name__}: {str(text)[:60]}")
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="surrogatepass")


def encode(text: str | bytes, bos: bool = True, eos: bool = True) -> np.ndarray:
    """The ids of a document, int64 [bytes + bos + eos]."""
    data = to_bytes(text)
    ids = np.empty(len(data) + bos + eos, dtype=np.int64)
    ids[int(bos) : int(bos) + len(data)] = np.frombuffer(data, dtype=np.uint8)
    ids[int(bos) : int(bos) + len(data)] += OFFSET
    if bos:
        ids[0] = BOS
    if eos:
        ids[-1] = EOS
    return ids


def decode(ids: np.ndarray | list[int]) -> bytes:
    """The bytes among `ids`, in order; special ids and padding are dropped."""
    array = np.asarray(ids, dtype=np.int64)
    return (array[array >= OFFSET] - OFFSET).astype(np.uint8).tobytes()
