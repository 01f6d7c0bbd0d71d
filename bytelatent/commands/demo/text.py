"""Text for the demo: Python's standard library, or the user's own."""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bytelatent.errors import UserError
from bytelatent.files import whole_file
from bytelatent.text import MAX_ROW_BYTES, BadRows, find_files, read_documents
from bytelatent.text.documents import must_have_read

HELD_OUT_ONE_IN = 16  # documents, chosen by a hash of their names
CHUNK = 8192  # bytes; longer documents are split, so that the held-out text is not from a few of them only
LEAST = 100_000  # bytes of training text
# Not installed everywhere, of other packages, or (encodings) tables of characters rather than text.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class DemoText:
    train: Path  # JSONL
    valid: Path
    train_bytes: int
    valid_bytes: int
    what: str  # in a few words


def collect(
    own: str | None,
    folder: Path,
    text_key: str = "text",
    bad: BadRows | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> DemoText:
    """Write `train.jsonl` and `valid.jsonl` into `folder`.

    Args:
        own: a file or folder of the user's; None for the standard library.
        text_key: the key or column of the user's text.
        bad: counts bad rows and files; None raises at the first.
        max_row_bytes: longer rows are bad rows.

    Raises:
        UserError: there is too little text.
    """
    bad = BadRows(0) if bad is None else bad
    documents = list(_own(own, text_key, bad, max_row_bytes) if own is not None else _standard_library())
    what = f"'{own}'" if own is not None else "Python's standard library"
    parts: dict[str, list[tuple[str, bytes]]] = {"train": [], "valid": []}
    held_out = _held_out([name for name, _ in documents])
    for name, text in documents:
        parts["valid" if name in held_out else "train"].extend(_chunks(name, text))
    for rows in parts.values():
        rows.sort(key=lambda row: _hash(row[0]))  # any prefix is a fair sample
    sizes = {part: sum(len(text) for _, text in rows) for part, rows in parts.items()}
    if sizes["train"] < LEAST or not sizes["valid"]:
        must_have_read(bad.unread)  # an error that names a file comes before one about too little text
        raise UserError(
            f"demo: {what} holds {sum(sizes.values()):,} bytes, {sizes['valid']:,} of them held out; "
            f"it takes {LEAST:,} bytes at the least, in one file or many"
        )
    for part, rows in parts.items():
        with whole_file(folder / f"{part}.jsonl") as aside, aside.open("w", encoding="utf-8") as lines:
            for name, text in rows:
                row = {"id": name, "text": text.decode("utf-8", errors="surrogateescape")}
                lines.write(json.dumps(row) + "\n")
    return DemoText(folder / "train.jsonl", folder / "valid.jsonl", sizes["train"], sizes["valid"], what)


def _standard_library() -> Iterator[tuple[str, bytes]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if not LEFT_OUT & set(name.parts):
            yield str(name), file.read_bytes()
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"pydoc_data/{name}", text.encode("utf-8")


def _own(path: str, text_key: str, bad: BadRows, max_row_bytes: int) -> Iterator[tuple[str, bytes]]:
    """The user's documents; a few documents are split into chunks."""
    found = []
    for file in find_files(path):
        documents = read_documents(file, text_key, bad_rows=bad, stored=False, max_row_bytes=max_row_bytes)
        found += [(f"{file}:{row}", document.text) for row, document in documents]
    for name, text in found:
        yield from _chunks(name, text) if len(found) < HELD_OUT_ONE_IN else [(name, text)]


def _chunks(name: str, text: bytes) -> Iterator[tuple[str, bytes]]:
    """Parts of at most `CHUNK` bytes, which end with a line if possible."""
    at = 0
    while at < len(text):
        line_end = text.rfind(b"\n", at + CHUNK // 2, at + CHUNK)
        end = line_end + 1 if line_end >= 0 else at + CHUNK
        yield f"{name}:{at}", text[at:end]
        at = end


def _held_out(names: list[str]) -> set[str]:
    """The names chosen by their hash; if there are too few names for that, those with the smallest hash."""
    chosen = {name for name in names if _hash(name) % HELD_OUT_ONE_IN == 0}
    return chosen or set(sorted(names, key=_hash)[: max(1, len(names) // HELD_OUT_ONE_IN)])


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
