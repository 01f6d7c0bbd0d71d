import json
import lzma
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bytelatent import BLT
from bytelatent.commands import demo as demo_command
from bytelatent.commands import demo_stages
from bytelatent.commands.demo import closing_lines, text_options
from bytelatent.commands.demo_stages import CHUNK, LEAST_TEXT, DemoText, collect, xz_bits_per_byte
from bytelatent.commands.options import DemoSettings
from bytelatent.errors import Interrupted, UserError
from bytelatent.progress import Progress
from bytelatent.text import BadRows
from bytelatent.training import trainer as loop
from tests import processes

PARTS = ("train", "valid")
NOUNS = ["cat", "dog", "house", "garden", "river", "tree", "child", "boat"]
VERBS = ["sees", "likes", "finds", "leaves", "paints"]


def sentences(seed: int, num_bytes: int) -> str:
    draw = random.Random(seed)
    text = ""
    while len(text) < num_bytes:
        text += f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}.\n"
    return text


def run_demo(minutes: float, out: Path, text: str) -> dict[str, Any]:
    """Also of less time than the command takes."""
    return demo_command.run(DemoSettings(out=out, text=text).model_copy(update={"minutes": minutes}))


def collected(text: str | None, out: Path) -> DemoText:
    return collect(DemoSettings(text=text, out=out), BadRows(0))


@pytest.fixture(scope="module")
def own_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 documents, 150 KB together."""
    folder = tmp_path_factory.mktemp("own")
    for number in range(40):
        (folder / f"{number}.txt").write_text(sentences(number, 3750))
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, own_text: Path) -> tuple[Path, dict[str, Any]]:
    """A demo of a second, where an earlier one stood."""
    folder = tmp_path_factory.mktemp("demo") / "my run"
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "train.jsonl").write_text("")
    (folder / "checkpoints" / "step-99999999").mkdir(parents=True)
    (folder / "old.txt").write_text("of the earlier demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_stages, "SAMPLE_BYTES", 20)
        patch.setattr(demo_stages.Clock, "left", 600.0)  # what comes after training may take its time
        return folder, run_demo(0.02, folder, str(own_text))


def documents(folder: Path, part: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


def test_writes_what_it_promises(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = demo
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary.keys() >= {
        "bits_per_byte",
        "mean_patch_bytes",
        "threshold",
        "seconds",
        "train_bytes",
        "valid_bytes",
        "sample",
    }
    assert summary["bits_per_byte"].keys() == {"blt", "byte_lm", "xz"}
    assert 0 < summary["bits_per_byte"]["xz"] < 2
    assert all(0 < bits < 9 for bits in summary["bits_per_byte"].values())
    assert summary["sample"].startswith("def read(self, ")
    for name in ("metrics.jsonl", "settings.yaml", "calibration.json", "byte_lm/model.safetensors"):
        assert (folder / name).stat().st_size > 0
    assert (folder / "byte_lm_training" / "metrics.jsonl").is_file()
    page = (folder / "report.html").read_text()
    assert "</html>" in page
    assert f"{summary['bits_per_byte']['blt']:.3f}" in page


def test_an_earlier_demo_is_replaced(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = demo
    assert not (folder / "old.txt").exists()
    assert not (folder / "checkpoints" / "step-99999999").exists()


def test_the_model_can_be_used(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = demo
    model = BLT.from_pretrained(folder, device="cpu")
    assert model.patching.threshold == summary["threshold"]
    assert len(model.generate("The cat", 5)) > 0
    held_out = "".join(row["text"] for row in documents(folder / "text", "valid"))
    assert len(held_out) == summary["valid_bytes"]
    rows = [row["text"] for row in documents(folder / "text", "valid")]
    num_patches = sum(len(model.patch(row)) for row in rows)
    assert len(held_out) / num_patches == pytest.approx(summary["mean_patch_bytes"])
    bits = sum(model.bits_per_byte(row) * len(row) for row in rows) / len(held_out)
    assert bits == pytest.approx(summary["bits_per_byte"]["blt"], rel=0.01)  # batches cut some documents elsewhere


def test_held_out_documents_are_not_learned_from(demo: tuple[Path, dict[str, Any]], own_text: Path) -> None:
    folder, summary = demo
    names = {part: [row["id"].rpartition(":")[0] for row in documents(folder / "text", part)] for part in PARTS}
    assert not set(names["train"]) & set(names["valid"])
    texts = {part: [row["text"] for row in documents(folder / "text", part)] for part in PARTS}
    assert sum(map(len, texts["train"])) == summary["train_bytes"]
    whole = sorted(path.read_text() for path in own_text.iterdir())
    assert sorted(texts["train"] + texts["valid"]) == whole


def test_a_single_file_is_held_out_by_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(sentences(0, 400_000).encode() + b"\xff no UTF-8\n")
    found = collected(str(path), tmp_path)
    rows = {part: documents(tmp_path / "text", part) for part in PARTS}
    assert len(rows["valid"]) >= 1
    assert found.train_bytes + found.valid_bytes == path.stat().st_size
    at = {int(row["id"].rsplit(":", 2)[1]): row["text"] for part in PARTS for row in rows[part]}
    whole = "".join(at[place] for place in sorted(at))
    assert whole.encode("utf-8", "surrogateescape") == path.read_bytes()
    assert all(len(text) <= CHUNK for text in at.values())
    assert all(text.endswith("\n") for text in at.values())


@pytest.mark.parametrize("num_files", [1, 2, 15, 16, 40])
@pytest.mark.parametrize("place", ["a", "b", "c"])
def test_some_text_is_held_out_wherever_it_lies(tmp_path: Path, num_files: int, place: str) -> None:
    own = tmp_path / place
    own.mkdir()
    for number in range(num_files):
        (own / f"{number}.txt").write_text(sentences(number, 150_000 // num_files))
    found = collected(str(own), tmp_path)
    assert found.valid_bytes >= 1000
    assert found.train_bytes >= LEAST_TEXT


def test_the_standard_library_is_the_text_otherwise(tmp_path: Path) -> None:
    found = collected(None, tmp_path)
    assert found.name == "Python's standard library"
    assert found.train_bytes > 5_000_000
    assert 0.03 < found.valid_bytes / found.train_bytes < 0.12
    train, valid = ({row["id"].rpartition(":")[0] for row in documents(tmp_path / "text", part)} for part in PARTS)
    assert not train & valid
    assert not any("site-packages" in name or name.startswith("test/") for name in train | valid)
    kept = {part: (tmp_path / "text" / f"{part}.jsonl").read_bytes() for part in PARTS}
    collected(None, tmp_path)
    assert kept == {part: (tmp_path / "text" / f"{part}.jsonl").read_bytes() for part in PARTS}


@pytest.mark.parametrize("own", ["little", "absent"])
def test_too_little_text_is_one_line_and_the_earlier_demo_stays(tmp_path: Path, own: str) -> None:
    folder = tmp_path / "demo"
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "train.jsonl").write_text("")
    (folder / "report.html").write_text("of the earlier demo")
    (tmp_path / "little").write_text(sentences(0, 50_000))
    with pytest.raises(UserError, match=f"{LEAST_TEXT:,} bytes at the least" if own == "little" else "does not exist"):
        run_demo(0.02, folder, str(tmp_path / own))
    assert (folder / "report.html").read_text() == "of the earlier demo"


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_no_demo_is_left_alone(tmp_path: Path, own_text: Path, what: str) -> None:
    place = tmp_path / "thesis"
    mine = place if what == "file" else place / "thesis.tex"
    if what == "folder":
        place.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="holds something else than an earlier demo; name another folder with --out"):
        run_demo(0.02, place, str(own_text))
    assert mine.read_text() == "mine"
    assert [path.name for path in tmp_path.rglob("*")] == ([mine.name] if what == "file" else ["thesis", "thesis.tex"])


@pytest.mark.parametrize("number", [0, 1])
def test_the_next_commands_run_as_they_are_printed(demo: tuple[Path, dict[str, Any]], number: int) -> None:
    folder, _ = demo
    lines = [line for label, line in closing_lines(folder, []) if line.startswith("blt")]
    verb = shlex.split(lines[number])[1:]  # as a shell does
    done = processes.ended([sys.executable, "-m", "bytelatent", *verb], {**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_next_demo_is_in_the_same_place_on_the_same_text() -> None:
    options = text_options(DemoSettings(text="my notes", text_key="content"))
    again = closing_lines(Path("my runs/demo"), options)[-1][1]
    of_text = ["--text-key", "content", "--text", "my notes"]
    assert shlex.split(again) == ["blt", "demo", "--minutes", "20", "--out", "my runs/demo", *of_text]


def test_the_command_is_named_by_its_path_where_the_shell_does_not_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = tmp_path / "a venv" / "blt"
    called.parent.mkdir()
    called.write_text("#!/bin/sh\n")
    called.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(called), "demo"])
    monkeypatch.setenv("PATH", "")
    assert shlex.split(dict(closing_lines(Path("x"), []))["next"])[0] == str(called)
    monkeypatch.setenv("PATH", str(called.parent))
    assert shlex.split(dict(closing_lines(Path("x"), []))["next"])[0] == "blt"


@pytest.mark.parametrize("begun", [[], [".train.jsonl.123.part"]])
def test_a_demo_that_was_stopped_at_once_begins_again(tmp_path: Path, begun: list[str]) -> None:
    (tmp_path / "text").mkdir()
    for name in begun:
        (tmp_path / "text" / name).write_text("")
    (tmp_path / "little").write_text(sentences(0, 50_000))
    with pytest.raises(UserError, match="holds something else"):
        run_demo(0.02, tmp_path, str(tmp_path / "little"))
    (tmp_path / "little").rename(tmp_path.with_name("little"))
    with pytest.raises(UserError, match="bytes at the least"):
        run_demo(0.02, tmp_path, str(tmp_path.with_name("little")))


@pytest.mark.parametrize("stage", ["training", "measuring"])
def test_the_message_of_a_stopped_demo(
    tmp_path: Path, own_text: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    folder, calls = tmp_path / "demo", []
    cross_entropy = loop.cross_entropy

    def stopped(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return cross_entropy(*arguments)

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    if stage == "training":
        monkeypatch.setattr(loop, "cross_entropy", stopped)
    else:
        monkeypatch.setattr(demo_command, "measure", interrupted)
    with pytest.raises(Interrupted) as caught:
        run_demo(1.0 if stage == "training" else 0.02, folder, str(own_text))
    assert str(caught.value).endswith("the same command begins again")
    if stage == "training":
        assert "generate" not in str(caught.value)
    else:
        assert f"the BLT as far as it is trained can be used: blt generate 'def read(self' -m {folder};" in str(
            caught.value
        )
        assert len(BLT.from_pretrained(folder, device="cpu").generate("The cat", 5)) > 0


def test_xz_packs_the_held_out_text_behind_the_training_text() -> None:
    train, valid = sentences(0, 60_000).encode(), sentences(1, 5_000).encode()
    bits, how = xz_bits_per_byte(train, valid, Progress("xz"))

    def size(data: bytes) -> int:
        if shutil.which("xz"):
            return len(subprocess.run(["xz", "-9e", "-c"], input=data, capture_output=True, check=True).stdout)
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    assert bits == 8 * (size(train + valid) - size(train)) / len(valid)
    assert bits < 8 * size(valid) / len(valid)
    assert "prefix" in how


def test_xz_alone_where_the_training_text_is_longer_than_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytelatent.commands.demo_stages.XZ_WINDOW", 60_000)
    train, valid = sentences(0, 60_000).encode(), sentences(1, 5_000).encode()
    bits, how = xz_bits_per_byte(train, valid, Progress("xz"))
    assert bits == 8 * len(lzma.compress(valid, preset=9 | lzma.PRESET_EXTREME)) / len(valid)
    assert "alone" in how


def test_a_file_of_which_nothing_is_read_does_not_stop_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, and reported as an error once the demo is done."""
    own = tmp_path / "notes"
    own.mkdir()
    (own / "note.txt").write_bytes(b"a line of a note\n" * 10_000)
    (own / "torn.parquet").write_bytes(b"PAR1 torn")
    ran: list[DemoText] = []
    monkeypatch.setattr(demo_command, "_run", lambda clock, text, *rest: ran.append(text))
    with pytest.raises(UserError, match=r"nothing of '.*torn.parquet' could be read"):
        run_demo(1.0, tmp_path / "demo", str(own))
    assert [text.train_bytes + text.valid_bytes for text in ran] == [170_000]
