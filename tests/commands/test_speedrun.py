"""`blt speedrun` from end to end, on tiny entries and a tiny text."""

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bytelatent.cli import main
from bytelatent.commands.speedrun import run
from bytelatent.commands.study_options import SpeedrunSettings
from bytelatent.config import load_yaml, to_yaml
from bytelatent.data import Loader
from bytelatent.study import speedrun_text
from bytelatent.study.speedrun import Entry, SpeedrunResult, read_result, table_of_results
from bytelatent.training import read_metrics
from bytelatent.weights import load, open_pretrained
from tests.training.tiny_runs import BLT, BYTE_LM, STACK, WORDS

Command = Callable[..., tuple[int, str, str]]
PROJECT = Path(__file__).parents[2]
ENTRIES = PROJECT / "apps" / "bytelatent" / "speedrun"
DATA = {"context": 64, "batch_bytes": 256, "shuffle_buffer": 8}
SETTINGS: dict[str, Any] = {
    "data": DATA,
    "optimizer": {"lr": 3e-3, "warmup_steps": 3},
    "log_every": 1,
    "device": "cpu",
    "dtype": "float32",
}
TINY = {
    "blt": {
        "minutes": 0.05,
        "model": BLT,
        "patching": {"mode": "entropy"},
        "calibration": {"patch_bytes": 3.0, "text_bytes": 2000},
        "entropy_model": {"minutes": 0.01, "model": BYTE_LM, **SETTINGS},
        **SETTINGS,
    },
    "tokens": {
        "minutes": 0.03,
        "model": {"kind": "token_lm", **STACK, "vocab_size": 300},
        "tokenizer": {"vocab": 300, "max_bytes": 3000},
        **SETTINGS,
    },
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The text of a tiny speedrun."""
    folder, draw, digests = tmp_path_factory.mktemp("text"), random.Random(0), {}
    for part, count in {"train.jsonl": 60, "tune.jsonl": 4, "valid.jsonl": 12}.items():
        rows = [
            {"text": " ".join(draw.choice(WORDS) for _ in range(20)), "category": ("prose", "code")[number % 2]}
            for number in range(count)
        ]
        (folder / part).write_text("".join(json.dumps(row) + "\n" for row in rows))
        digests[part] = hashlib.sha256((folder / part).read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speedrun_text, "PARTS", digests)
        yield folder


@pytest.fixture
def blt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `blt speedrun`; gives the exit code, and what it prints on standard output and on standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blt", "speedrun", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(str(ended.value.code or 0)), captured.out, captured.err

    return run


def entry_file(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / f"{name}.yaml"
    values = {**TINY[name], **changes}
    path.write_text(to_yaml({key: value for key, value in values.items() if value is not None}))
    return path


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two entries wrote."""
    folder = tmp_path_factory.mktemp("speedrun")
    for name in TINY:
        run(SpeedrunSettings(entry=str(entry_file(folder, name)), text=text, out=folder / "out"))
    return folder / "out"


def test_results_are_those_of_the_runs(finished: Path, text: Path) -> None:
    num_bytes = sum(len(json.loads(line)["text"]) for line in (text / "valid.jsonl").read_text().splitlines())
    for name, parts in {"blt": ["entropy model", "threshold", "model"], "tokens": ["tokenizer", "model"]}.items():
        result = read_result(finished / f"{name}.json")
        assert result.problem() is None
        assert list(result.seconds) == parts
        rows = [row for row in read_metrics(finished / name / "model" / "metrics.jsonl") if "seconds" in row]
        assert (result.steps, result.bytes_read) == (rows[-1]["step"], rows[-1]["bytes_seen"])
        # What learns from the text shares the minutes; the last step may end after them, and the first one is counted.
        mean, last = rows[-1]["seconds"] / (len(rows) - 1), rows[-1]["seconds"] - rows[-2]["seconds"]
        assert result.seconds["model"] == pytest.approx(rows[-1]["seconds"] + mean)
        assert 0 < sum(result.seconds.values()) - 60 * result.minutes < last + 2 * mean
        assert result.held_out.bytes == num_bytes
        groups = result.held_out.by_category
        assert list(groups) == ["prose", "code"]
        mean = sum(group.bits_per_byte * group.bytes for group in groups.values()) / num_bytes
        assert result.held_out.bits_per_byte == pytest.approx(mean)
        assert result.again == pytest.approx(result.held_out.bits_per_byte, abs=1e-6)
        tensors = open_pretrained(finished / name / "weights").tensors.values()
        assert result.parameters + result.table_parameters == sum(tensor.load().numel() for tensor in tensors)
    blt = read_result(finished / "blt.json")
    stored = load(finished / "blt" / "weights")
    assert stored.config.patching is not None
    assert stored.config.patching.threshold == blt.threshold
    assert 1.5 < blt.mean_patch_bytes < 6
    assert blt.entropy_model_training_flops > 0


def test_the_held_out_text_is_not_trained_on(finished: Path, text: Path) -> None:
    for folder in ("blt/entropy_model", "blt/model", "tokens/model"):
        data = load_yaml(finished / folder / "settings.yaml")["data"]
        assert [source["path"] for source in data["train"]] == [str(text / "train.jsonl")]
        assert [source["path"] for source in data["valid"]] == [str(text / "tune.jsonl")]


def test_a_result_is_checked_against_its_model(finished: Path, text: Path, tmp_path: Path, blt: Command) -> None:
    path, weights = tmp_path / "tokens.json", tmp_path / "weights"
    shutil.copy(finished / "tokens.json", path)
    shutil.copytree(finished / "tokens" / "weights", weights)
    code, out, _ = blt("--check", path, weights, "--text", text)
    bits = read_result(path).held_out.bits_per_byte
    assert code == 0
    assert f"is confirmed: {bits:.4f} bits per byte, measured again {bits:.4f}; a trial, not for the table" in out

    def refused() -> str:
        code, out, error = blt("--check", path, weights, "--text", text)
        assert (code, out, len(error.splitlines())) == (2, "", 1)
        return error

    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "steps": values["steps"] + 1}))
    assert "it was changed after it was written" in refused()
    better = {**values["held_out"], "bits_per_byte": bits - 0.01}
    signed(path, values, held_out=better)
    assert "its two measurements differ" in refused()
    signed(path, values, held_out=better, again=bits - 0.01)
    assert f"has {bits:.5f} bits per byte here, and '{path}' states {bits - 0.01:.5f}" in refused()
    signed(path, values, text={**values["text"], "valid.jsonl": "0"})
    assert "it is of another text than the speedrun's" in refused()
    signed(path, values)
    shutil.rmtree(weights)
    shutil.copytree(finished / "blt" / "weights", weights)
    assert f"'{weights}' is not the model of '{path}'" in refused()
    path.write_text("[]")
    assert "is no result of blt speedrun" in refused()


def signed(path: Path, values: dict[str, Any], **changes: Any) -> None:
    result = SpeedrunResult.parse({**values, **changes}).signed()
    path.write_text(result.model_dump_json())


def test_the_table_has_results_of_ten_minutes_alone(finished: Path, tmp_path: Path, blt: Command) -> None:
    code, out, error = blt("--table", finished)
    assert (code, out) == (2, "")
    seconds = sum(read_result(finished / "blt.json").seconds.values())
    assert f"blt.json': a trial, not for the table: the clock counted {seconds:.1f} s of 0.05 minutes" in error
    values = json.loads((finished / "tokens.json").read_text())
    for name, bits, device in (("worse", 1.2, "cpu, one"), ("best", 1.05, "NVIDIA H200")):
        held_out = {"bits_per_byte": bits, "bytes": 9, "by_category": {"code": {"bits_per_byte": 0.8, "bytes": 9}}}
        changes = {
            "seconds": {"tokenizer": 10.0, "model": 590.4},
            "training_flops": 6.5e16 - 1e15,
            "entropy_model_training_flops": 1e15,
            "date": "2026-11-30",
        }
        changes |= {"bytes_read": 190_000_000, "parameters": 110_000_000, "again": bits, "device": device}
        signed(tmp_path / f"{name}.json", values, name=name, minutes=10.0, held_out=held_out, **changes)
    code, out, _ = blt("--table", tmp_path)
    assert code == 0
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert header[:6] == ["entry", "model", "device", "date", "bits per byte", "code"]
    best = "best|token LM, 110.0 M|NVIDIA H200|2026-11-30|1.0500|0.8000|190 MB|6.5e16|600"
    assert rows[0] == best.split("|")
    assert [row[0] for row in rows] == ["best", "worse"]
    (tmp_path / "worse.json").rename(tmp_path / "other.json")
    assert "other.json': it is of 'worse'" in blt("--table", tmp_path)[2]
    assert "absent' is no folder; blt speedrun ENTRY.yaml writes" in blt("--table", tmp_path / "absent")[2]
    (tmp_path / "empty").mkdir()
    assert "holds no results, files NAME.json; blt speedrun ENTRY" in blt("--table", tmp_path / "empty")[2]


@pytest.mark.parametrize(
    ("name", "changes", "shown"),
    [
        ("tokens", {"minutes": None}, "minutes: an entry trains for minutes; write minutes: 10"),
        ("tokens", {"minutes": None, "steps": 9}, "minutes: an entry trains for minutes"),
        ("tokens", {"minutes": -1}, "minutes: an entry trains for minutes"),
        ("tokens", {"steps": 9}, "steps: minutes end the run; leave it out"),
        ("tokens", {"run": "runs/mine"}, "run: --out names the folder; leave it out"),
        ("tokens", {"data": {**DATA, "train": "other.jsonl"}}, "data.train: all entries have the same text, --text"),
        ("tokens", {"data": {**DATA, "tokenizer": "a.json"}}, "data.tokenizer: a tokenizer is trained on the same cl"),
        ("tokens", {"tokenizer": None}, "data.tokenizer: a token LM needs one"),
        ("tokens", {"tokenizer": {"vocab": 9}}, "tokenizer: vocab: Input should be greater than or equal to 261"),
        ("tokens", {"parallel": {"tensor": 2}}, "parallel.tensor: an entry has one GPU; leave it out"),
        ("tokens", {"optimizer": {"learning": 1}}, "optimizer.learning: unknown key"),
        ("blt", {"entropy_model": "runs/byte_lm"}, "entropy_model: 'runs/byte_lm' is there already, and the clock"),
        ("blt", {"byte_lm": "runs/byte_lm", "entropy_model": None}, "entropy_model: 'runs/byte_lm' is there already"),
        ("blt", {"entropy_model": None}, "entropy_model: this model needs one"),
        ("blt", {"patching": {"mode": "space"}, "calibration": None}, "entropy_model: this model has no use for one"),
        ("blt", {"entropy_model": {"model": BYTE_LM, "data": DATA}}, "entropy_model.minutes: an entry trains for mi"),
        ("blt", {"entropy_model": {**TINY["tokens"], "tokenizer": None}}, "entropy_model: tokenizer: unknown key"),
        (
            "blt",
            {"entropy_model": {"minutes": 0.01, "model": BLT, "patching": {"mode": "space"}, "data": DATA}},
            "entropy_model.model: a byte LM finds patches, no BLT",
        ),
    ],
)
def test_what_is_no_entry_is_refused(
    name: str, changes: dict[str, Any], shown: str, text: Path, tmp_path: Path, blt: Command
) -> None:
    path = entry_file(tmp_path, name, **changes)
    code, out, error = blt(path, "--text", text, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert [line for line in error.splitlines() if "is now" not in line] == [error.splitlines()[-1]]
    assert f"error: '{path}': {shown}" in error
    assert not (tmp_path / "out").exists()


def test_another_text_a_second_gpu_and_a_result_that_is_there(
    finished: Path, text: Path, tmp_path: Path, blt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, out = entry_file(tmp_path, "tokens"), tmp_path / "out"

    def refused(*options: object) -> str:
        code, printed, error = blt(entry, *options)
        assert (code, printed, len(error.splitlines())) == (2, "", 1)
        return error

    other = tmp_path / "text"
    shutil.copytree(text, other)
    (other / "tune.jsonl").write_text('{"text": "more"}\n')
    assert f"'{other}/tune.jsonl' is not that of the speedrun (SHA-256 " in refused("--text", other, "--out", out)
    (other / "train.jsonl").unlink()
    assert f"'{other}/train.jsonl' does not exist; build it" in refused("--text", other, "--out", out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were started, and an entry has one GPU" in refused("--text", text, "--out", out)
    monkeypatch.delenv("WORLD_SIZE")
    assert not out.exists()
    assert "tokens.json' is there already; move it away" in refused("--text", text, "--out", finished)
    (out / "tokens").mkdir(parents=True)
    assert "holds something else than an entry" in refused("--text", text, "--out", out)
    assert blt("--text", text)[2].startswith("error: speedrun: name an entry")
    assert "json: it has no effect with --check; leave" in blt("--check", finished / "blt.json", "model", "--json")[2]
    assert "entry: it has no effect with --table; leave it out" in blt(entry, "--table", finished)[2]


def test_an_interrupted_entry_begins_again_unless_only_measurements_are_left(
    text: Path, tmp_path: Path, blt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, out = entry_file(tmp_path, "tokens"), tmp_path / "out"
    read, num_read = Loader.__next__, 0

    def interrupted(loader: Loader) -> Any:
        nonlocal num_read
        num_read += 1
        if num_read == 5:
            raise KeyboardInterrupt
        return read(loader)

    monkeypatch.setattr(Loader, "__next__", interrupted)
    code, _, error = blt(entry, "--text", text, "--out", out)
    assert code == 130
    assert "training does not resume, and the same command begins it again" in error
    (out / "tokens" / "left").touch()
    monkeypatch.setattr("bytelatent.commands.speedrun._measured_again", lambda *_: 0.5)
    code, _, error = blt(entry, "--text", text, "--out", out)
    assert code == 2
    assert "its two measurements differ" in error
    assert not (out / "tokens" / "left").exists()
    assert read_metrics(out / "tokens" / "model" / "metrics.jsonl")[0]["step"] == 1
    assert not (out / "tokens.json").exists()

    before, bits = num_read, float(error.rpartition("differ: ")[2].split()[0])
    monkeypatch.setattr("bytelatent.commands.speedrun._measured_again", lambda *_: bits)
    assert blt(entry, "--text", text, "--out", out)[0] == 0
    assert num_read == before
    assert (
        read_result(out / "tokens.json").steps == read_metrics(out / "tokens" / "model" / "metrics.jsonl")[-1]["step"]
    )
    (out / "tokens.json").unlink()
    assert blt(entry, "--text", text, "--out", out, "--minutes", 0.02)[0] == 2  # other minutes: other training
    assert num_read > before


def test_a_tokenizer_that_takes_all_the_time(text: Path, tmp_path: Path, blt: Command) -> None:
    code, _, error = blt(entry_file(tmp_path, "tokens", minutes=1e-5), "--text", text, "--out", tmp_path / "out")
    assert code == 2
    assert "nothing of 1e-05 minutes is left for the model; tokenizer 0." in error.splitlines()[-1]


@pytest.mark.parametrize("path", sorted(ENTRIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_entries_of_the_project(path: Path) -> None:
    entry = Entry.read(path, Path("text"), Path("out"))
    half = Entry.read(path, Path("text"), Path("out"), minutes=5.0)
    assert (entry.model.minutes, half.model.minutes) == (10, 5)
    if entry.entropy_model is not None:
        assert half.entropy_model is not None
        assert half.entropy_model.minutes == (entry.entropy_model.minutes or 0) / 2


def test_the_page_has_the_table_of_the_results() -> None:
    """To print it: `blt speedrun --table docs/study/speedrun`."""
    folder = PROJECT / "docs" / "study" / "speedrun"
    table = table_of_results(folder) if any(folder.glob("*.json")) else "There are no results yet."
    assert table in folder.with_suffix(".md").read_text(encoding="utf-8")
