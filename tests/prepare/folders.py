"""Prepared folders, looked at; and preparing without processes of its own, for tests that do it many times."""

import json
from pathlib import Path
from typing import Any

from bytelatent.prepare import PrepareSettings, prepare
from bytelatent.prepare.plan import WorkFolder
from bytelatent.prepare.run import _plan
from bytelatent.prepare.scatter import scatter_rows
from bytelatent.prepare.shuffle import plan_outputs
from bytelatent.prepare.write import finish, gather_rows
from bytelatent.vocab import to_bytes


def outputs(folder: Path) -> dict[str, bytes]:
    """The output files, validation first, then the chunks in order."""
    files = [*folder.glob("*.val.jsonl"), *sorted(folder.glob("*.chunk.*.jsonl"))]
    return {file.name: file.read_bytes() for file in files}


def lines(folder: Path) -> list[bytes]:
    return b"".join(outputs(folder).values()).splitlines(keepends=True)


def texts(folder: Path, key: str = "text") -> list[bytes]:
    return [to_bytes(json.loads(line.decode("utf-8", "surrogateescape"))[key]) for line in lines(folder)]


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def made(out: Path, *source: Path | str, **settings: Any) -> Path:
    return prepare(PrepareSettings.parse({"source": [str(s) for s in source], "out": out, "workers": 2, **settings}))


def made_here(out: Path, *source: Path | str, **settings: Any) -> Path:
    """The same in this process."""
    wanted = PrepareSettings.parse({"source": [str(s) for s in source], "out": out, "workers": 1, **settings})
    work = WorkFolder(out)
    work.folder.mkdir(parents=True)
    _plan(wanted, wanted.request(), work)
    for task in range(len(work.plan.tasks)):
        scatter_rows(work, task, lambda count: None)
    plan_outputs(work)
    for rank in range(3):
        gather_rows(work, rank, 3, lambda count: None)
    finish(work)
    return out


def rows(count: int, size: int = 20, first: int = 0) -> list[bytes]:
    """Lines of JSON of various lengths, no two the same."""
    return [b'{"text": "%d %s"}\n' % (i, b"x" * (i * 7919 % size)) for i in range(first, first + count)]
