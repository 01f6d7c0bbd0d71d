"""Bits per byte of models on the same texts: by source or category, with bootstrap intervals, resumable."""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bytelatent.data import Patcher
from bytelatent.data.patcher import StoredCheck
from bytelatent.errors import UserError
from bytelatent.evaluation.models import Cost, TextModel, counted
from bytelatent.model.loss import bits_per_byte
from bytelatent.text import MAX_ROW_BYTES, BadRows, Document, find_files, read_documents
from bytelatent.text.documents import NotPlain
from bytelatent.text.folders import name_inside

# Shapes: M models, D documents, R resamples

BY_SOURCE = "source"
NO_FIELD = "(none)"
LEVEL = 95  # percent, of intervals
FEWEST = 10  # documents; the spread of fewer says too little


@dataclass(frozen=True)
class TextSample:
    """A document to measure, where it is from, and the group it counts for."""

    file: str
    row: int
    group: str
    document: Document

    @property
    def digest(self) -> str:
        return hashlib.blake2b(self.document.text, digest_size=8).hexdigest()


@dataclass
class Texts:
    """The documents of some sources, once and in order, as often as they are asked for.

    Args:
        sources: files, folders or globs.
        by: the key or column whose value is a document's group; `source` for its source or, where there is only one
            source, its file; None for one group.
        max_bytes: of text; the last document is cut, not inside a character.
        valid_only: leave out documents that are not valid UTF-8.

    Attributes:
        bad_rows: of the last reading.
        num_left_out, bytes_left_out: documents that are not valid UTF-8.
    """

    sources: Sequence[str]
    text_key: str = "text"
    by: str | None = None
    max_bytes: int | None = None
    valid_only: bool = False
    max_bad_rows: int = 0
    max_row_bytes: int = MAX_ROW_BYTES
    bad_rows: BadRows = field(default_factory=lambda: BadRows(0))
    num_left_out: int = 0
    bytes_left_out: int = 0

    def __post_init__(self) -> None:
        self.files = [(source, file) for source in self.sources for file in find_files(source)]

    def read(self, patcher: Patcher | None = None) -> Iterator[TextSample]:
        """
        Args:
            patcher: takes entropies or starts that are stored with the text.

        Raises:
            UserError: the text cannot be read, or the key of its groups holds a list or an object.
        """
        self.bad_rows, self.num_left_out, self.bytes_left_out = BadRows(self.max_bad_rows), 0, 0
        check, num_bytes = StoredCheck(patcher), 0
        key = None if self.by == BY_SOURCE else self.by
        more: dict[str, Any] = {"bad_rows": self.bad_rows, "max_row_bytes": self.max_row_bytes, "field_key": key}
        for source, file in self.files:
            for row, document in read_documents(file, self.text_key, check, stored=check.patcher is not None, **more):
                if self.max_bytes is not None and num_bytes >= self.max_bytes:
                    return
                if self.valid_only and not _is_valid(document.text):
                    self.num_left_out += 1
                    self.bytes_left_out += len(document.text)
                    continue
                left = None if self.max_bytes is None else self.max_bytes - num_bytes
                num_bytes += len(document.text)
                if left is not None and len(document.text) > left:
                    document = _first(document, left)
                    if not document.text:
                        return
                yield TextSample(file, row, self._group(source, file, row, document), document)

    def check(self) -> None:
        """
        Raises:
            UserError: the text cannot be read, or no document has the key.
        """
        if self.by in (None, BY_SOURCE):
            return
        first = None
        for sample in self.read():
            if sample.document.field is not None:
                return
            first = first or sample
        if first is not None:
            raise UserError(
                f"by: no document has '{self.by}', neither the first one, of '{first.file}', nor another; "
                "name a key or column, or source"
            )

    def _group(self, source: str, file: str, row: int, document: Document) -> str:
        if self.by == BY_SOURCE:
            return source if len(self.sources) > 1 else name_inside(file, source)
        if isinstance(document.field, NotPlain):
            hint = f"such as {self.by}.KEY" if document.field is NotPlain.OBJECT else "whose values are plain"
            kind = document.field.value
            raise UserError(f"by: '{self.by}' holds {kind} in '{file}' row {row}; name a key or column {hint}")
        return "" if self.by is None else NO_FIELD if document.field is None else document.field

    def remarks(self, reader: str) -> list[str]:
        """What the last reading left out, in a line each.

        Args:
            reader: the model whose tokenizer does not read all documents.
        """
        found = []
        if self.num_left_out:
            amount = f"{counted(self.num_left_out, 'document')} ({self.bytes_left_out:,} bytes)"
            are, they = ("is", "it is") if self.num_left_out == 1 else ("are", "they are")
            found.append(
                f"{amount} {are} left out: {they} not valid UTF-8, which the tokenizer of '{reader}' cannot read"
            )
        if bad := self.bad_rows.count:
            found.append("1 bad row or file is left out" if bad == 1 else f"{bad:,} bad rows or files are left out")
        if empty := self.bad_rows.num_empty:
            found.append(f"{counted(empty, 'empty document')} {'is' if empty == 1 else 'are'} left out")
        return found


def _first(document: Document, num_bytes: int) -> Document:
    """A document's first bytes, and what is stored for them; a character is not cut, where all are valid."""
    text = document.text
    if _is_valid(text):
        while num_bytes and text[num_bytes] & 0xC0 == 0x80:
            num_bytes -= 1
    entropies, starts = document.entropies, document.starts
    return Document(
        text[:num_bytes],
        document.id,
        None if entropies is None else entropies[: num_bytes + 1],
        None if starts is None else starts[: num_bytes + 1],
        document.field,
    )


def _is_valid(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@dataclass
class Measured:
    """What the texts cost one model, document by document."""

    nats: list[float] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    num_units: list[int] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        for name, values in vars(self).items():
            values.append(row[name])

    def by_group(self) -> dict[str, "Measured"]:
        """The documents of each group, in the order in which the groups come."""
        found = {group: Measured() for group in dict.fromkeys(self.groups)}
        for row in zip(*vars(self).values(), strict=True):
            values = dict(zip(vars(self), row, strict=True))
            found[values["groups"]].add(values)
        return found

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(math.fsum(self.nats), sum(self.num_bytes))


def measure_texts(
    model: TextModel,
    texts: Texts,
    measured: Measured,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    on_batch: Callable[[int], None] = lambda num_bytes: None,
    like: Measured | None = None,
) -> None:
    """Add what the texts cost a model to `measured`, which may hold the first documents already.

    Args:
        on_row: called with each document's row, in order.
        on_batch: called with the number of bytes of each finished batch, or that was there already.
        like: what another model was measured on, which must be the same.

    Raises:
        UserError: the text is not that of `measured` or `like`; or a document's cost is not finite.
    """
    waiting: deque[TextSample] = deque()
    before = (like or measured).digests
    expected, done = list(before), len(measured.nats)

    def documents() -> Iterator[Document]:
        number = -1
        for number, sample in enumerate(texts.read(getattr(model, "patcher", None))):
            if (number < len(expected) and sample.digest != expected[number]) or (like and number >= len(expected)):
                raise UserError(
                    f"eval: '{sample.file}' row {sample.row} is another text than before; it changed meanwhile: "
                    "begin again, with another --out if there is one"
                )
            waiting.append(sample)
            yield sample.document
        if number + 1 < len(expected):
            raise UserError(f"eval: the text holds {number + 1} documents now and had {len(expected)}; begin again")

    for cost in model.costs(documents(), on_batch, known=done):
        sample = waiting.popleft()
        if cost.is_known:
            continue
        if not math.isfinite(cost.nats):
            raise UserError(
                f"eval: '{model.name}' gives {cost.nats} nats on '{sample.file}' row {sample.row}; its weights are "
                "corrupt, or too large for --dtype"
            )
        row = _row(sample, cost)
        measured.add(row)
        on_row(row)


def _row(sample: TextSample, cost: Cost) -> dict[str, Any]:
    return {
        "file": sample.file,
        "row": sample.row,
        "groups": sample.group,
        "num_bytes": cost.num_bytes,
        "num_units": cost.num_units,
        "nats": cost.nats,
        "digests": sample.digest,
    }


Interval = tuple[float, float]


def bootstrap(
    nats_MD: np.ndarray, num_bytes_D: np.ndarray, resamples: int, seed: int, level: float = LEVEL
) -> tuple[list[Interval], list[Interval]]:
    """Intervals of bits per byte, and of the difference of each model's to the first one's.

    Documents are drawn with replacement, as many as there are, the same for all models; the intervals are between
    percentiles of what the draws give.

    Args:
        level: percent of the draws that an interval holds.
    """
    draw, num_documents = np.random.default_rng(seed), len(num_bytes_D)
    values_DM1 = np.concatenate([nats_MD, num_bytes_D[None]]).T.astype(np.float64)
    bits_RM = np.empty((resamples, len(nats_MD)))
    for number in range(resamples):
        counts_D = np.bincount(draw.integers(num_documents, size=num_documents), minlength=num_documents)
        sums = counts_D @ values_DM1
        bits_RM[number] = sums[:-1] / sums[-1] / math.log(2)
    tail = (100 - level) / 2
    found = []
    for each in (bits_RM, bits_RM - bits_RM[:, :1]):
        low_M, high_M = np.percentile(each, [tail, 100 - tail], axis=0)
        found.append([(float(low), float(high)) for low, high in zip(low_M, high_M, strict=True)])
    return found[0], found[1]


def compare(models: Sequence[Measured], resamples: int, seed: int) -> list[dict[str, Any]]:
    """For each model the numbers of the same documents, with intervals where there are enough."""
    results: list[dict[str, Any]] = [
        {
            "bits_per_byte": each.bits_per_byte,
            "interval": None,
            "num_bytes": sum(each.num_bytes),
            "num_units": sum(each.num_units),
            "num_documents": len(each.nats),
        }
        for each in models
    ]
    if len(models) > 1:
        for result in results:
            result["difference"] = result["bits_per_byte"] - results[0]["bits_per_byte"]
            result["difference_interval"] = None
    if resamples and len(models[0].nats) >= FEWEST:
        nats = np.array([each.nats for each in models])
        intervals, differences = bootstrap(nats, np.array(models[0].num_bytes), resamples, seed)
        for result, interval, difference in zip(results, intervals, differences, strict=True):
            result["interval"] = interval
            if len(models) > 1:
                result["difference_interval"] = difference
    return results
