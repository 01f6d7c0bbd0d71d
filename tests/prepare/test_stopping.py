"""Kills, signals and restarts."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bytelatent.errors import UserError
from bytelatent.prepare import PrepareSettings, prepare, verify
from bytelatent.prepare import scatter as scattering
from bytelatent.prepare import write as writing
from tests.prepare.folders import made, made_here, outputs, rows

# A run with small parts that also takes its time between them, so that a kill meets it anywhere.
SLOW_RUN = """
import os, sys, time
from functools import partial
from pathlib import Path
from bytelatent.errors import guarded
from bytelatent.prepare import PrepareSettings, executors, plan, prepare, scatter, shuffle, write
plan.UNIT_BYTES, plan.TASK_BYTES, scatter.READ_BYTES, shuffle.SLICE_BYTES = 4000, 9000, 700, 300
executors.MAX_RUN_BYTES, executors.MAX_RANGE_BYTES = 8000, 5000
pause, runs = float(sys.argv[3]), scatter.RunWriter
def slow(call):
    return lambda *arguments: (time.sleep(pause), call(*arguments))
runs.flush, runs.finish, runs._write_index = slow(runs.flush), slow(runs.finish), slow(runs._write_index)
write.write_past_cache = slow(write.write_past_cache)
settings = PrepareSettings(source=[sys.argv[1]], out=Path(sys.argv[2]), workers=2, chunks=7, dedup=len(sys.argv) > 4)
guarded(lambda: prepare(settings))
"""


def start(source: Path, out: Path, pause: float, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_RUN, str(source), str(out), str(pause), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def children(process: int) -> list[int]:
    with open(f"/proc/{process}/task/{process}/children") as file:
        return [int(child) for child in file.read().split()]


def alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def has_begun(process: subprocess.Popen[str], folder: Path, files: int) -> bool:
    return process.poll() is not None or len(list(folder.glob("*/*"))) > files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows(2000)))
    return tmp_path / "a.jsonl"


@pytest.mark.parametrize("dedup", [False, True])
def test_killed_anywhere_and_restarted_it_makes_the_same_files(
    tmp_path: Path, source: Path, dedup: bool, many_parts: None
) -> None:
    undisturbed = outputs(made_here(tmp_path / "whole", source, chunks=7, dedup=dedup))
    out = tmp_path / "out"
    chance = random.Random(int(dedup))
    left_behind: set[int] = set()
    for _ in range(3):
        process = start(source, out, 0.003, *["dedup"] * dedup)
        wait_for(partial(has_begun, process, out / ".prepare", len(list((out / ".prepare").glob("*/*")))))
        time.sleep(chance.uniform(0, 0.4))
        if process.poll() is None:
            left_behind.update(children(process.pid))
        process.kill()
        process.communicate()
        if (out / "manifest.json").exists():
            break
        assert not (out / "manifest.json").exists()
    wait_for(lambda: not any(map(alive, left_behind)))
    made(out, source, chunks=7, dedup=dedup)
    assert outputs(out) == undisturbed
    assert verify(out) == []
    assert not (out / ".prepare").exists()


def test_what_is_done_is_not_done_again(
    tmp_path: Path,
    source: Path,
    many_parts: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    whole = outputs(made_here(tmp_path / "whole", source))
    stop_in_the_second_pass(out, source)
    monkeypatch.setattr(scattering, "RunWriter", broken)  # the first pass is done: nobody needs it any more
    prepare(PrepareSettings(source=[str(source)], out=out, workers=2))
    assert "resuming the work" in caplog.text
    assert outputs(out) == whole


def stop_in_the_second_pass(out: Path, source: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_past_cache", broken)
        with pytest.raises(RuntimeError, match="broken"):
            made(out, source)


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("broken")


def test_another_input_or_seed_starts_over(tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    stop_in_the_second_pass(out, source)
    for settings, why in (({"seed": 5}, "seed 42 -> 5"), ({}, "the input has changed")):
        copy = tmp_path / f"out{len(settings)}"
        shutil.copytree(out, copy)
        if not settings:
            source.write_bytes(b"".join(rows(77, first=5000)))
        caplog.clear()
        prepare(PrepareSettings(source=[str(source)], out=copy, workers=1, **settings))
        assert f"starting over: {why}" in caplog.text
        fresh = made_here(tmp_path / f"fresh{len(settings)}", source, **settings)
        assert outputs(copy) == outputs(fresh)


def test_a_killed_worker_ends_in_one_line(tmp_path: Path, source: Path) -> None:
    process = start(source, tmp_path / "out", 0.05)
    wait_for(lambda: len(children(process.pid)) == 2 and any((tmp_path / "out" / ".prepare").glob("scatter/*")))
    others = children(process.pid)
    os.kill(others[0], signal.SIGKILL)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 2
    assert said.count("\n") == 1
    assert "error: --workers: a worker was killed (SIGKILL" in said
    wait_for(lambda: not any(map(alive, others)))
    assert outputs(made(tmp_path / "out", source, chunks=7))


def test_ctrl_c_ends_in_one_line(tmp_path: Path, source: Path) -> None:
    process = start(source, tmp_path / "out", 0.05)
    wait_for(lambda: len(children(process.pid)) == 2)
    assert not (tmp_path / "out" / "manifest.json").exists()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert said == "stopped: nothing that is done is lost; the same command resumes\n"


def test_only_one_at_a_time(tmp_path: Path, source: Path) -> None:
    process = start(source, tmp_path / "out", 0.05)
    try:
        wait_for(lambda: len(children(process.pid)) == 2)
        with pytest.raises(UserError, match="another process prepares"):
            made(tmp_path / "out", source)
    finally:
        process.kill()
        process.communicate()
