"""Between the passes: where every document will stand, decided from the indexes alone.

The kept documents in the shuffled order are one stream: first those held out for validation, then those to train on.
The output files are pieces of it that end where documents end. A document that starts at byte s of the S bytes to train
on belongs to chunk s * N // S, so that each of the N chunks is within one document of S / N bytes.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from bytelatent.errors import UserError
from bytelatent.prepare.disk import write_text, writing
from bytelatent.prepare.index import Index, grouped
from bytelatent.prepare.inputs import InputFile
from bytelatent.prepare.rows import too_many
from bytelatent.prepare.runs import INDEX_BYTES
from bytelatent.prepare.settings import MAX_CHUNKS
from bytelatent.prepare.work import Work

MAX_VALIDATION = 10_000


@dataclass(frozen=True)
class Place:
    """A place between two documents of the stream."""

    documents: int
    bytes: int


class Stream:
    """The kept documents in the shuffled order, known bin by bin."""

    def __init__(self, index: Index, documents: np.ndarray, sizes: np.ndarray) -> None:
        self.index = index
        self.documents = np.concatenate([np.zeros(1, np.int64), np.cumsum(documents)])
        self.bytes = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        self._loaded: tuple[int, np.ndarray] = (-1, np.zeros(0))

    def after(self, count: int) -> Place:
        """The place after the first `count` documents."""
        if count >= self.documents[-1]:
            return Place(int(self.documents[-1]), int(self.bytes[-1]))
        bin_ = int(np.searchsorted(self.documents, count, side="right")) - 1
        return self._place(bin_, count - int(self.documents[bin_]))

    def at(self, offset: int) -> Place:
        """The first place at or after a byte."""
        if offset >= self.bytes[-1]:
            return self.after(int(self.documents[-1]))
        bin_ = int(np.searchsorted(self.bytes, offset, side="right")) - 1
        return self._place(bin_, int(np.searchsorted(self._starts(bin_), offset - int(self.bytes[bin_]))))

    def _place(self, bin_: int, inside: int) -> Place:
        return Place(int(self.documents[bin_]) + inside, int(self.bytes[bin_] + self._starts(bin_)[inside]))

    def _starts(self, bin_: int) -> np.ndarray:
        """Where in its bin each document starts, and the last one ends, int64 [N + 1]."""
        if self._loaded[0] != bin_:
            part = self.index.load(bin_, bin_ + 1)
            ends = np.cumsum(part.lengths[part.order], dtype=np.int64)
            self._loaded = (bin_, np.concatenate([np.zeros(1, np.int64), ends]))
        return self._loaded[1]


def cut(work: Work) -> None:
    """Decide which document goes where, and save it, unless that is done.

    Raises:
        UserError: there are no documents, fewer than chunks, or too many bad rows.
    """
    if work.cut_file.exists():
        return
    plan, index = work.plan, Index(work)
    corrupt = [place for marker in index.markers for place in marker["corrupt"]]
    if len(corrupt) > plan.request["max_bad_rows"]:
        raise too_many(corrupt, plan.request["max_bad_rows"])
    documents, sizes = index.totals()
    read, read_bytes = int(documents.sum()), int(sizes.sum())
    if read == 0:
        raise UserError(f"{_names(plan.request['source'])}: no documents" + (f"; bad: {corrupt[0]}" if corrupt else ""))
    kept, kept_bytes = documents, sizes
    if index.dedup:
        kept, kept_bytes = index.kept(documents, max(plan.range_bytes // (2 * INDEX_BYTES), 1))
    stream = Stream(index, kept, kept_bytes)
    ranges = []
    for first, end in grouped(sizes + INDEX_BYTES * documents, plan.range_bytes):
        if documents[first:end].any():
            place = [int(stream.bytes[first]), int(stream.bytes[end])]
            ranges.append({"bins": [first, end], "stream": place, "read_bytes": int(sizes[first:end].sum())})
    saved = {
        "documents_read": read,
        "bytes_read": read_bytes,
        "documents": int(kept.sum()),
        "bytes": int(kept_bytes.sum()),
        "corrupt": corrupt,
        "unread": _unread(index.markers, plan.files),
        "outputs": outputs(stream, plan.request),
        "ranges": ranges,
    }
    with writing(work.out):
        write_text(work.cut_file, json.dumps(saved))


def _unread(markers: list[dict[str, Any]], files: list[InputFile]) -> dict[str, str]:
    """The files of which nothing could be read, each with the reason."""
    good = {number for marker in markers for number in marker["good_files"]}
    bad = {number: why for marker in reversed(markers) for number, why in marker["bad_files"]}
    return {files[number].path: why for number, why in sorted(bad.items()) if number not in good}


def outputs(stream: Stream, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The output files in the order of the stream: name, documents, and where in it they begin and end."""
    total = int(stream.documents[-1])
    held_out = request["validation"]
    if held_out is None:
        held_out = 0 if total < 2 else min(MAX_VALIDATION, max(total // 100, 1))
    elif held_out >= total:
        raise UserError(f"--validation: {held_out} of {total} documents leave none to train on; give fewer")
    left = total - held_out
    chunks = request["chunks"] or min(MAX_CHUNKS, left)
    if chunks > left:
        raise UserError(f"--chunks: {chunks} are more than the {left} documents to train on; give fewer")
    name, digits = request["name"], max(2, len(str(chunks - 1)))
    first = stream.after(held_out)
    size = int(stream.bytes[-1]) - first.bytes
    places = [first, *(stream.at(first.bytes - (-chunk * size // chunks)) for chunk in range(1, chunks))]
    places.append(stream.after(total))
    found = [_output(f"{name}.val.jsonl", Place(0, 0), first)] if held_out else []
    for chunk in range(chunks):
        found.append(_output(f"{name}.chunk.{chunk:0{digits}d}.jsonl", places[chunk], places[chunk + 1]))
    return found


def _output(name: str, begin: Place, end: Place) -> dict[str, Any]:
    return {"name": name, "documents": end.documents - begin.documents, "begin": begin.bytes, "end": end.bytes}


def _names(sources: list[str]) -> str:
    return ", ".join(f"'{source}'" for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
