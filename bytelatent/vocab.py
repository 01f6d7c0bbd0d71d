"""Ids and bytes: four special ids, then the 256 byte values.

Byte `b` is id `b + 4`. A document is BOS, its bytes, EOS. Any byte string is a valid document: nothing here
assumes UTF-8.
"""

import itertools
import re
from collections.abc import Sequence

import numpy as np

from bytelatent.errors import UserError

BOE, BOS, EOS, BPE_DELIMITER = 0, 1, 2, 3
OFFSET = 4
NEWLINE = OFFSET + ord("\n")
VOCAB_SIZE = OFFSET + 256
PADDING = -1  # fills ragged rows of ids; never embedded
OTHER_SURROGATES = re.compile("([\ud800-\udc7f\udd00-\udfff]+)")  # those that stand for no byte


def to_bytes(text: str | bytes) -> bytes:
    """UTF-8; bytes as they are.

    A surrogate that stands for a byte that is no UTF-8 (U+DC80 to U+DCFF) becomes that byte again. Any other surrogate
    is encoded as if it were a character.

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
        parts = OTHER_SURROGATES.split(text)  # every second part is of these
        errors = itertools.cycle(("surrogateescape", "surrogatepass"))
        return b"".join(part.encode("utf-8", errors=how) for part, how in zip(parts, errors, strict=False))


class Vocabulary:
    """The ids of a model, and the bytes of text that each stands for: here bytes; `text.Tokenizer` has tokens.

    Attributes:
        size: ids.
        bos, eos: the ids that begin and end a document.
        bytes_of: what each id stands for, nothing for a special one.
        id_bytes: [size] how many bytes that is.
        dtype: in which ids are held.
    """

    is_tokens = False

    def __init__(self) -> None:
        self.size, self.bos, self.eos = VOCAB_SIZE, BOS, EOS
        self.bytes_of = [bytes([id_ - OFFSET]) if id_ >= OFFSET else b"" for id_ in range(VOCAB_SIZE)]
        self.id_bytes = np.array([len(data) for data in self.bytes_of])
        self.dtype = np.dtype(np.uint16)

    @property
    def unit(self) -> str:
        return "tokens" if self.is_tokens else "bytes"

    def encode(self, text: str | bytes, bos: bool = True, eos: bool = True) -> np.ndarray:
        """The ids of a document, int64."""
        return encode(text, bos, eos)

    def decode(self, ids: np.ndarray | Sequence[int]) -> bytes:
        """The bytes of `ids`, in order; special ids and padding are dropped."""
        return decode(ids)


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


def decode(ids: np.ndarray | Sequence[int]) -> bytes:
    """The bytes among `ids`, in order; special ids and padding are dropped."""
    array = np.asarray(ids, dtype=np.int64)
    return (array[array >= OFFSET] - OFFSET).astype(np.uint8).tobytes()


BYTES = Vocabulary()
