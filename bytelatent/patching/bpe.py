"""Patches at the boundaries of a BPE tokenizer.

A tokenizer needs the following byte to know that a token has ended; patches must not depend on the future, or they
would leak where the next token begins before the model predicts its first byte. So a boundary is placed where it
becomes known: after the first byte of the new token, as the mode `space` places it after the space. To be exact, the
id after byte i starts a patch when the newest token of the last 64 bytes up to i begins later than the newest token of
the last 64 bytes up to i-1.

Source: Pagnoni et al. 2024, section 2.4 (BPE is not an incremental patching scheme).
"""

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.vocab import OFFSET

WINDOW = 64  # bytes of context a tokenizer is given for each decision


@dataclass(frozen=True)
class Tail:
    """The last bytes of one row."""

    data: bytes = b""
    num_read: int = 0  # bytes read in all
    newest_token: int = -1  # where the newest token begins, counted from the first byte ever read
    token_began: bool = False  # whether the last id read began a token (special ids always do)

    def read(self, id_: int, tokenizer: str) -> "Tail":
        if id_ < OFFSET:
            return Tail(token_began=True)
        data = (self.data + bytes([id_ - OFFSET]))[-WINDOW:]
        num_read = self.num_read + 1
        start = _newest_tokens([data], tokenizer)[0]
        newest = self.newest_token if start is None else num_read - len(data) + start
        return Tail(data, num_read, newest, newest > self.newest_token)


def token_starts(ids: Tensor, position: Tensor, tokenizer: str) -> Tensor:
    """For each id whether the next one starts a patch; see `bytelatent.patching.starts.next_starts`."""
    starts = torch.zeros(ids.numel(), dtype=torch.bool)
    windows: list[bytes] = []
    where: list[tuple[int, int, bool]] = []  # index in the stream, byte at which the window begins, first of a run
    run, run_begins = b"", True
    for index, (id_, at) in enumerate(zip(ids.flatten().tolist(), position.flatten().tolist(), strict=True)):
        if at == 0 or id_ < OFFSET:
            run, run_begins, num_read = b"", True, 0
        if id_ < OFFSET:
            starts[index] = True
            continue
        run = (run + bytes([id_ - OFFSET]))[-WINDOW:]
        num_read += 1
        windows.append(run)
        where.append((index, num_read - len(run), run_begins))
        run_begins = False
    newest = -1
    for (index, begins, first), start in zip(where, _newest_tokens(windows, tokenizer), strict=True):
        previous = -1 if first else newest
        newest = previous if start is None else begins + start
        starts[index] = newest > previous
    return starts.view(ids.shape).to(ids.device)


def _newest_tokens(windows: list[bytes], tokenizer: str) -> list[int | None]:
    """The byte offset of the last token of each window; None while its last character is incomplete."""
    texts, offsets = [], []
    for window in windows:
        text, begins, complete = _characters(window)
        texts.append(text)
        offsets.append(begins if complete else None)
    newest: list[int | None] = []
    for encoding, begins in zip(_encoded(texts, tokenizer), offsets, strict=True):
        # A byte-level tokenizer may cut inside a character, and its normalizer may drop one: offsets are characters.
        known = [start for start, end in encoding.offsets if end > start]
        newest.append(begins[known[-1]] if begins and known else None)
    return newest


def _encoded(texts: list[str], path: str) -> list[Any]:
    """Each text as tokens."""
    tokenizer = _load(path)
    with _as_user_error(f"patching.tokenizer: '{path}' cannot split this text; take the file of a byte-level BPE"):
        return tokenizer.encode_batch(texts, add_special_tokens=False)


@contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """Raise a UserError for what the Rust library raises: an Exception or a PanicException."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {error}") from None


def _characters(data: bytes) -> tuple[str, list[int], bool]:
    """Text, the byte at which each character begins, and whether the last one is complete.

    Bytes that are not UTF-8 become one replacement character each.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="bytelatent.one_each")
    text = decoder.decode(data)
    pending = len(decoder.getstate()[0])
    begins, at = [], 0
    for character in text:
        begins.append(at)
        width = len(character.encode("utf-8"))
        is_replaced = character == "�" and data[at : at + 3] != "�".encode()
        at += 1 if is_replaced else width
    return text, begins, pending == 0


def _one_each(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "�", error.start + 1


codecs.register_error("bytelatent.one_each", _one_each)


@cache
def _load(path: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError("patching mode 'bpe' needs the package tokenizers; run: pip install 'bytelatent[hf]'") from None
    if not Path(path).is_file():
        raise UserError(f"patching.tokenizer: '{path}' does not exist; it should be a Hugging Face tokenizer.json")
    with _as_user_error(f"patching.tokenizer: '{path}' is not a tokenizer.json"):
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8-sig"))
    # A file may carry the limits of the model it was made for; a cut window would hide its newest token.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
