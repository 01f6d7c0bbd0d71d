"""The rules once more, as loops over lists: slow and obvious, written from the facts and not from the code."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from bytelatent.patching import PatchSettings

# Each way a character of several bytes can look before its last byte is there. The last byte counts to 64, so one
# character of each 64 shows them all. Surrogates are no characters, but like Python's decoder the mode waits for their
# last byte before it calls them wrong.
UNFINISHED = {
    encoded[:length]
    for encoded in (chr(code).encode("utf-8", "surrogatepass") for code in range(0x80, 0x110000, 64))
    for length in range(1, len(encoded))
}


def starts(ids: Sequence[int], entropies: Sequence[float] | None, patching: PatchSettings) -> list[bool]:
    """For positions 0..N of one document of N ids, whether a patch starts there."""
    natural = [position == 0 or _starts_at(position, ids, entropies, patching) for position in range(len(ids) + 1)]
    if patching.max_patch_length is None:
        return natural
    split, length = [], 0
    for position, is_start in enumerate(natural):
        if is_start or length == patching.max_patch_length:
            split.append(True)
            length = 0
        else:
            split.append(False)
        length += 1
        assert position + 1 == len(split)
    return split


def lengths(is_start: Sequence[bool]) -> list[int]:
    """The lengths of the patches."""
    found: list[int] = []
    for start in is_start:
        if start:
            found.append(0)
        found[-1] += 1
    return found


def _starts_at(position: int, ids: Sequence[int], entropies: Sequence[float] | None, patching: PatchSettings) -> bool:
    """Whether the mode itself starts a patch at a position past the first, having read the ids before it."""
    i = position - 1
    match patching.mode:
        case "byte":
            return True
        case "static":
            assert patching.patch_size is not None
            return position % patching.patch_size == 0
        case "space":
            special = ids[i] < 4
            return special or (_space_like(ids[i]) and not (i > 0 and _space_like(ids[i - 1])))
        case "entropy":
            assert entropies is not None
            assert patching.threshold is not None
            if position == 1:
                return True
            above = entropies[i] > patching.threshold
            rise = float(np.float32(entropies[i]) - np.float32(entropies[i - 1]))
            if patching.monotonicity:
                return position == 2 or rise > patching.threshold
            if patching.threshold_add is not None:
                if position == 3:
                    return False
                return position == 2 or (above and rise > patching.threshold_add)
            return above
        case "bpe":
            assert patching.tokenizer is not None
            now, before = newest_token(ids[: i + 1], patching.tokenizer), newest_token(ids[:i], patching.tokenizer)
            return ids[i] < 4 or now > before


def _space_like(id_: int) -> bool:
    if id_ < 4:
        return True
    byte = id_ - 4
    alphanumeric = byte < 128 and chr(byte).isalnum()
    return not (alphanumeric or 0x80 <= byte <= 0xBF)


_tokenizers: dict[str, Tokenizer] = {}


def newest_token(ids: Sequence[int], path: str) -> int:
    """Where the newest token begins, in bytes since the last special id; -1 when there is none.

    The tokenizer sees the last 64 bytes. Until a character is complete, the newest token is what it was before.
    """
    since = max((index + 1 for index, id_ in enumerate(ids) if id_ < 4), default=0)
    run = bytes(id_ - 4 for id_ in ids[since:])
    if not run:
        return -1
    window = run[-64:]
    text, begins = "", []
    at = 0
    while at < len(window):
        rest = window[at:]
        if rest in UNFINISHED:
            return newest_token(ids[:-1], path)
        character, width = "\ufffd", 1
        for size in (1, 2, 3, 4):
            try:
                character, width = rest[:size].decode("utf-8"), len(rest[:size])
                break
            except UnicodeDecodeError:
                continue
        text += character
        begins.append(len(run) - len(window) + at)
        at += width
    if path not in _tokenizers:
        _tokenizers[path] = Tokenizer.from_file(path)
    tokens = [start for start, end in _tokenizers[path].encode(text, add_special_tokens=False).offsets if end > start]
    return begins[tokens[-1]] if tokens else newest_token(ids[:-1], path)
