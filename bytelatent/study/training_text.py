"""The training text of a study, and that no held-out document is in it."""

import hashlib
import heapq
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from bytelatent.data import DataSettings
from bytelatent.errors import UserError
from bytelatent.evaluation import Texts
from bytelatent.files import json_if_any, whole_file, write_whole_json
from bytelatent.progress import Progress
from bytelatent.study.plan import StudyText
from bytelatent.text import BadRows, find_files, read_documents
from bytelatent.text.documents import TextError
from bytelatent.training.run_setup import list_text

LOGGER = logging.getLogger(__name__)

TEXT = "text.json"
MOST_SHARED = 0.01  # of the documents of a held-out text, that may be in the training text too, by chance


class TrainingText:
    """The texts of a study, once they are checked.

    Args:
        folder: of the study, which has the size of the training text and the state of all.
        writes: keep them there.
    """

    def __init__(self, settings: StudyText, folder: Path, writes: bool = True):
        self.settings, self.folder, self.writes = settings, folder, writes
        self._aside: TemporaryDirectory[str] | None = None

    @property
    def state(self) -> str | None:
        """Of the training text; None before it is kept."""
        return (json_if_any(self.folder / TEXT) or {}).get("train")

    def check(self, held_out: bool = True) -> None:
        """
        Args:
            held_out: also of the text that results are of, which choices must not touch.

        Raises:
            UserError: text is not there, or is not what the study began with, or held-out text is trained on.
        """
        keys = ("train", "tuning", *(["held_out"] if held_out else []))
        for key in keys:
            for path in getattr(self.settings, key):
                try:
                    find_files(path)
                except TextError as error:
                    raise UserError(f"text.{key}: {error.line}") from None
        before = json_if_any(self.folder / TEXT) or {}
        now = {key: self._state(key) for key in keys}
        for key, state in now.items():
            if before.get(key) not in (None, state):
                raise UserError(
                    f"text.{key}: it is not the text that the study in '{self.folder}' began with; put that back, or "
                    "name another folder: --out"
                )
        if now.keys() <= before.keys():
            return
        others = [key for key in keys if key != "train" and key not in before]
        for key in others:
            self._check_category(key)
        self.train_bytes = self._read_training_text(others)
        if self.writes:
            write_whole_json(self.folder / TEXT, {**before, **now, "train_bytes": self.train_bytes}, indent=1)

    def _check_category(self, key: str) -> None:
        """Check that documents have the field of their category; it takes the first one that has."""
        text = self.settings
        try:
            Texts(
                getattr(text, key),
                text.text_key,
                text.category,
                max_bad_rows=text.max_bad_rows,
                max_row_bytes=text.max_row_bytes,
            ).check()
        except UserError as error:
            raise UserError(f"text.category: {str(error).removeprefix('by: ')}") from None

    def _read_training_text(self, others: Sequence[str]) -> int:
        """Its size; hardly a document of other texts may be in it, as `tuning` and `held_out` are."""
        digests = {key: {_digest(text) for text in self.documents(key, f"reading text.{key}")} for key in others}
        found: dict[str, set[bytes]] = {key: set() for key in others}
        num_bytes, sample = 0, _Sample(self.settings.measured_bytes)
        for text in self.documents("train", "reading text.train"):
            num_bytes += len(text)
            digest = _digest(text)
            sample.add(digest, text)
            for key in others:
                if digest in digests[key]:
                    found[key].add(digest)
        for key in others:
            line = f"text.{key}: {len(found[key])} of its {len(digests[key])} different documents are in text.train too"
            if len(found[key]) > MOST_SHARED * len(digests[key]):
                raise UserError(f"{line}, and a model may know them by heart; leave them out there")
            if found[key]:
                LOGGER.warning(line)
        sample.write(self._sample_path)
        return num_bytes

    def _state(self, key: str) -> str:
        listed = list_text(DataSettings.parse({"train": getattr(self.settings, key)}))
        states = [[file.size, file.digest or file.changed] for file in listed.values()]
        return hashlib.blake2b(json.dumps(states).encode(), digest_size=16).hexdigest()

    @cached_property
    def train_bytes(self) -> int:
        """The size of the training text."""
        known = (json_if_any(self.folder / TEXT) or {}).get("train_bytes")
        return known or self._read_training_text([])

    @cached_property
    def sample(self) -> Path:
        """A file with documents from all over the training text, on which it is measured: the same each time."""
        if not self._sample_path.is_file():
            self._read_training_text([])
        return self._sample_path

    @cached_property
    def sample_bytes(self) -> int:
        """The size of their text."""
        return sum(len(json.loads(line)["text"].encode()) for line in self.sample.open(encoding="utf-8"))

    @property
    def _sample_path(self) -> Path:
        path = self.folder / f"sample-{self.settings.measured_bytes}.jsonl"
        if self.writes or path.is_file():
            return path
        self._aside = self._aside or TemporaryDirectory(prefix="bytelatent-")
        return Path(self._aside.name) / path.name

    def documents(self, key: str, what: str, max_bytes: int | None = None) -> Iterator[bytes]:
        text, num_bytes, paths = self.settings, 0, getattr(self.settings, key)
        files = [file for path in paths for file in find_files(path)]
        bad = BadRows(text.max_bad_rows)
        size = sum(os.path.getsize(file) for file in files if os.path.isfile(file)) or None
        total = size if max_bytes is None else min(max_bytes, size or max_bytes)
        with Progress(what, total, about=True) as progress:
            for file in files:
                found = read_documents(
                    file, text.text_key, bad_rows=bad, stored=False, max_row_bytes=text.max_row_bytes
                )
                for _, document in found:
                    yield document.text if max_bytes is None else document.text[: max_bytes - num_bytes]
                    num_bytes += len(document.text)
                    progress.advance(len(document.text))
                    if max_bytes is not None and num_bytes >= max_bytes:
                        return
        if not num_bytes:
            raise UserError(f"text.{key}: {', '.join(map(repr, paths))} holds no text")


class _Sample:
    """The documents with the least digests, about as many as hold `num_bytes`; those that are UTF-8."""

    def __init__(self, num_bytes: int):
        self.left = num_bytes
        self._heap: list[tuple[int, bytes]] = []  # the greatest digest first

    def add(self, digest: bytes, text: bytes) -> None:
        heapq.heappush(self._heap, (-int.from_bytes(digest, "big"), text))
        self.left -= len(text)
        while self.left + len(self._heap[0][1]) <= 0:  # enough without it
            self.left += len(heapq.heappop(self._heap)[1])

    def write(self, path: Path) -> None:
        with whole_file(path) as aside, aside.open("w", encoding="utf-8") as file:
            for _, text in sorted(self._heap, reverse=True):
                with suppress(UnicodeDecodeError):
                    file.write(json.dumps({"text": text.decode()}) + "\n")


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=8).digest()
