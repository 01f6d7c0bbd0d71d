"""Many prompts from a file, by the command that a person starts and stops."""

import gzip
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from bytelatent.commands import generate
from bytelatent.commands.rows import _must_be_made_with
from bytelatent.errors import UserError
from bytelatent.files import growing_file, partial_path
from tests import processes
from tests.training.tiny_runs import byte_lm_run, settings, write_text

GENERATE = [sys.executable, "-m", "bytelatent.cli", "generate"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bytelatent.training import train

    folder = tmp_path_factory.mktemp("byte_lm")
    return train(settings(byte_lm_run(folder / "run", write_text(folder / "text.jsonl", seed=0), steps=2)))


def write_rows(path: Path, number: int, num_bytes: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"row {row}", "n": row}) + "\n" for row in range(number)))
    path.with_suffix(".length").write_text(str(num_bytes))
    return path


def command(rows: Path, model: Path, out: Path, *more: object) -> list[str]:
    length = rows.with_suffix(".length").read_text()
    given = ("--jsonl", rows, "-m", model, "--batch-size", 2, "-n", length, "--out", out, *more)
    return [*GENERATE, *map(str, given)]


def ended(*given: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    return processes.ended(list(given), ENVIRONMENT, **more)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_keeps_its_rows_and_goes_on(how: signal.Signals, model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 24, 60)
    out, part = tmp_path / "out" / "answers.jsonl", tmp_path / "out" / "answers.jsonl.part"
    process = processes.Command(command(rows, model, out), ENVIRONMENT)
    until = time.monotonic() + 60
    while time.monotonic() < until and not (part.exists() and b"\n" in part.read_bytes()):
        time.sleep(0.01)
    process.send_signal(how)
    shown = process.communicate(timeout=60)[1]
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert shown == (
            f"stopped: '{out}' was not written; the rows so far are in '{part}', and the same command resumes\n"
        )
    assert names(out.parent) == {part.name, f"{part.name}.settings"}
    before = [line for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 0 < len(before) < 24
    with part.open("ab") as file:
        file.write(b'{"prompt": "row 2", "te')  # cut
    again = ended(*command(rows, model, out))
    assert again.returncode == 0, again.stderr
    assert again.stderr == f"{len(before)} of 24 rows are in '{part}'; resuming\n"
    assert names(out.parent) == {out.name}
    assert out.read_bytes().startswith(b"".join(before))
    whole = tmp_path / "whole.jsonl"
    assert ended(*command(rows, model, whole)).returncode == 0
    assert out.read_bytes() == whole.read_bytes()
    assert [json.loads(line)["n"] for line in out.read_bytes().splitlines()] == [*range(24)]


def test_a_full_disk_keeps_the_rows_so_far(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 20, 10)
    out = tmp_path / "out.jsonl"
    full = ended(*command(rows, model, out), max_file=600)
    assert full.returncode == 2
    [line] = full.stderr.splitlines()
    assert line == (
        "error: the output cannot be written: File too large; "
        f"the rows so far are in '{out}.part', and the same command resumes"
    )
    kept = partial_path(out).read_bytes()
    assert kept.endswith(b"\n")
    assert 0 < len(kept) <= 600
    assert not out.exists()
    assert ended(*command(rows, model, out)).returncode == 0
    assert len(out.read_bytes().splitlines()) == 20
    assert not partial_path(out).exists()


def test_what_belongs_to_another_command_is_not_gone_on_with(model: Path, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", 3, 4), tmp_path / "out.jsonl"
    part = partial_path(out)
    part.write_text('{"prompt": "mine"}\n')
    assert "is in the way" in ended(*command(rows, model, out)).stderr
    assert part.read_text() == '{"prompt": "mine"}\n'
    part.unlink()
    assert ended(*command(rows, model, out)).returncode == 0
    first = out.read_bytes().splitlines(keepends=True)[0]
    out.unlink()

    from bytelatent.commands.generate import GENERATED, GenerateSettings, _made_with, _rows
    from bytelatent.commands.rows import rows_at

    asked = GenerateSettings(model=str(model), jsonl=str(rows), out=out, max_new_bytes=4, rows=2)

    def fail() -> None:
        with rows_at(out, [row.given for row in _rows(asked)], _made_with(asked), GENERATED) as (file, num_done):
            assert num_done == 0
            file.write(first)
            raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        fail()
    assert part.read_bytes() == first
    part.write_bytes(b"{no row}\n")
    assert "line 1 of" in ended(*command(rows, model, out)).stderr
    part.write_bytes(first)
    shown = ended(*command(rows, model, out, "--temperature", 0.5)).stderr
    assert "was begun with sampling.temperature=0.8, not 0.5" in " ".join(shown.split())
    rows.write_text(rows.read_text().replace("row 0", "row zero"))
    assert "line 1 of" in ended(*command(rows, model, out)).stderr
    assert part.read_bytes() == first


def test_a_growing_file_has_one_writer_and_is_gone_without_a_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with growing_file(out) as file, pytest.raises(ValueError, match="another process"), growing_file(out):
        file.write(b"never")

    def fail() -> None:
        with growing_file(tmp_path / "other") as file:
            file.write(b"torn" * 50_000)
            raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        fail()
    assert names(tmp_path) == {"out"}


def test_no_more_rows_are_made_than_there_are_sequences(model: Path, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", 2, 3), tmp_path / "out.jsonl"
    done = ended(*command(rows, model, out, "--batch-size", 10**6))
    assert done.returncode == 0, done.stderr
    assert len(out.read_bytes().splitlines()) == 2


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail] can't allocate memory"), torch.OutOfMemoryError("CUDA")]
)
def test_too_little_memory_names_the_rows(
    error: Exception, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine_for(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(generate, "engine_for", engine_for)
    rows = write_rows(tmp_path / "rows.jsonl", 5, 3)
    with pytest.raises(UserError, match=r"^batch_size: memory does not hold 4 sequences at once; lower --batch-size$"):
        run(model=str(model), jsonl=str(rows), batch_size=4)
    with pytest.raises(UserError, match=r"^prompt: memory does not hold it beside the model; give a shorter one$"):
        run(model=str(model), prompt="a" * 100)


@pytest.mark.parametrize("prompt", ["# no comment", "a # b", "a\nb: c", "  b ", "", "{", "@x", "[1, 2", "a${b}", "1e3"])
def test_a_prompt_of_the_command_line_is_taken_as_it_stands(
    prompt: str, model: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    generate.main([f"model={model}", "max_new_bytes=1", f"prompt={prompt}"])
    shown = capfdbinary.readouterr().out
    assert shown.startswith(prompt.encode())
    assert len(shown) <= len(prompt) + 4  # a byte, as a character, and the line's end


def run(**given: object) -> tuple[list[dict[str, object]], str]:
    """The rows that come out, and what is logged."""
    out, logged = io.BytesIO(), io.StringIO()
    handler = logging.StreamHandler(logged)
    generate.LOGGER.addHandler(handler)
    try:
        generate.generate(generate.GenerateSettings.parse(given), out)
    finally:
        generate.LOGGER.removeHandler(handler)
    return [json.loads(line) for line in out.getvalue().splitlines()], logged.getvalue()


def test_keys_that_are_mistakes_are_named(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    for wrong, right in (("Temperature", "temperature"), ("max-new-bytes", "max_new_bytes"), ("PROMPT", "prompt")):
        rows.write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "b", wrong: 0}))
        with pytest.raises(UserError, match=f"line 2: '{wrong}' is no setting; write '{right}'"):
            run(model="absent", jsonl=str(rows))
    rows.write_text(
        '{"prompt": "a", "temprature": 0, "text": "mine", "title": 1, "ended": 2, "log_probabilities": 3, '
        '"max_new_tokens": 5, "rows": 6}\n'
    )
    [row], said = run(model=str(model), jsonl=str(rows), max_new_bytes=2)
    assert said.splitlines() == [
        f"'{rows}' has 'ended' of its own, which the rows that come out do not keep",
        f"'{rows}' has 'log_probabilities', which is no setting of a row and passes through",
        f"'{rows}' has 'max_new_tokens', which is no setting and passes through; did you mean 'max_new_bytes'?",
        f"'{rows}' has 'rows', which is no setting of a row and passes through",
        f"'{rows}' has 'temprature', which is no setting and passes through; did you mean 'temperature'?",
        f"'{rows}' has 'text' of its own, which the rows that come out do not keep",
    ]
    assert (row["temprature"], row["title"], row["log_probabilities"]) == (0, 1, 3)
    assert run(model=str(model), jsonl=str(rows), max_new_bytes=2, samples=2)[0][0]["text"] == "mine"


def test_compressed_rows(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 3, 2)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(rows.read_bytes()))
    assert run(model=str(model), jsonl=str(packed), max_new_bytes=2) == run(
        model=str(model), jsonl=str(rows), max_new_bytes=2
    )
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"is not whole: .* cut short"):
        run(model="absent", jsonl=str(packed))


def test_half_of_a_character_is_no_prompt(model: Path, tmp_path: Path) -> None:
    half = r"prompt: '\\ud83d' at character 2 is half of a surrogate pair; write the whole character, or give bytes$"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b\\ud83d"}\n')
    with pytest.raises(UserError, match=f"^{rows}: line 2: {half}"):
        run(model="absent", jsonl=str(rows))
    with pytest.raises(UserError, match=f"^{half}"):
        run(model="absent", prompt="b\ud83d")


def test_surrogates_beside_a_prompt_come_out_as_they_went_in(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    given = {"prompt": "\udcffä😀", "title": "\ud83d"}  # the first stands for a byte that is no UTF-8
    rows.write_text(json.dumps(given))
    [row] = run(model=str(model), jsonl=str(rows), max_new_bytes=2)[0]
    assert row.items() > given.items()


def test_what_holds_something_is_not_replaced(model: Path, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", 3, 2), tmp_path / "out.jsonl"
    given = {"model": "absent", "jsonl": str(rows), "max_new_bytes": 2}
    before = rows.read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(rows)
    for same in (rows, link):
        refused = rf"^out: '{same}' holds something already; name another file, or move it away$"
        with pytest.raises(UserError, match=refused):
            run(**given, out=same)
    assert rows.read_bytes() == before
    out.touch()  # as mktemp leaves it
    run(**given | {"model": str(model)}, out=out)
    done = out.read_bytes()
    assert len(done.splitlines()) == 3
    with pytest.raises(UserError, match="holds something already"):
        run(**given, out=out)
    assert out.read_bytes() == done
    assert not partial_path(out).exists()


def test_prompts_that_stand_where_rows_would_wait_are_left_whole(tmp_path: Path) -> None:
    rows = tmp_path / "out.part"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b"}')  # the last line without its end
    with pytest.raises(UserError, match=r"^out: '.*out.part' is in the way, and there is no '.*out.part.settings'"):
        run(model="absent", jsonl=str(rows), out=tmp_path / "out")
    assert rows.read_text() == '{"prompt": "a"}\n{"prompt": "b"}'
    assert names(tmp_path) == {"out.part"}


def test_what_came_meanwhile_stays(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", 3, 2), tmp_path / "out.jsonl"
    given = {"model": str(model), "jsonl": str(rows), "max_new_bytes": 2, "out": out}
    write = generate._write

    def another_writes(file: BinaryIO, data: bytes) -> None:
        write(file, data)
        out.write_text("another's")

    with monkeypatch.context() as patched:
        patched.setattr(generate, "_write", another_writes)
        with pytest.raises(UserError, match=r"holds something already; .* and the same command resumes$"):
            run(**given)
    assert out.read_text() == "another's"
    out.unlink()
    assert run(**given)[1].startswith("3 of 3 rows are in")
    assert len(out.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("name", ["rows.jsonl/out", "a" * 250])
def test_a_name_that_cannot_be_written_is_reported(name: str, model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 1, 2)
    with pytest.raises(UserError, match=rf"'.*{name}.*' cannot be written: "):
        run(model=str(model), jsonl=str(rows), max_new_bytes=2, out=tmp_path / name)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device is of Linux")
def test_a_full_device_is_reported_in_one_line(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 2, 5)
    full = ended(*command(rows, model, Path("/dev/full")))
    assert full.returncode == 2
    assert full.stderr == "error: the output cannot be written: No space left on device\n"


def test_a_row_of_too_many_brackets_is_no_json(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n' + "[" * 200_000 + "\n")
    with pytest.raises(UserError, match=rf"^{rows}: line 2 is no JSON \("):
        run(model="absent", jsonl=str(rows))


def test_rows_that_an_earlier_build_began(tmp_path: Path) -> None:
    """Its settings had other names, and there were fewer."""
    part, settings = tmp_path / "out.part", tmp_path / "out.part.settings"
    settings.write_text('{"entropy": "byte_lm", "weights": "int8"}')
    _must_be_made_with(part, settings, {"entropy_model": "byte_lm", "quantize": "int8"})
    _must_be_made_with(part, settings, {"quantize": "int8", "kv_cache": "full"})
    with pytest.raises(UserError, match="was begun with kv_cache=full, not int8"):
        _must_be_made_with(part, settings, {"quantize": "int8", "kv_cache": "int8"})
    with pytest.raises(UserError, match="was begun with quantize=int8, not fp8"):
        _must_be_made_with(part, settings, {"entropy_model": "byte_lm", "quantize": "fp8"})
