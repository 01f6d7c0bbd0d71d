"""Nothing that steers a terminal reaches one, wherever it comes from; what is piped stays as it is."""

import ast
import io
import os
import pty
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress, TextColumn
from rich.table import Table

import bytelatent
from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.log import Console, _LogConsole
from bytelatent.patching import Patch, PatchSettings
from bytelatent.report import patched_text
from bytelatent.terminal import print_line, safe
from bytelatent.weights import Config
from tests.model.tiny import tiny_blt
from tests.processes import Command

ROOT = Path(bytelatent.__file__).parent
NASTY = "a\x1b]0;owned\x07\x1b[2Jb\x9b31mc\u202eevil\u2066d\x08\x08\x7f\r\u2028\ud800e"
STEERING = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), *"\u200e\u200f\u061c\u2028\u2029\ufeff\u00ad"}
STEERING |= {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
STEERING -= {"\n", "\t"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steers(text: str) -> set[str]:
    return STEERING & set(text)


@given(st.text() | st.text(st.sampled_from(sorted(STEERING | set("ab \n\t\u200d")))))
def test_safe(text: str) -> None:
    shown = safe(text)
    assert not steers(shown)
    assert safe(shown) == shown
    shown.encode()  # no halves of characters
    assert shown.count("\n") == text.count("\n")


def test_what_steers_nothing_is_as_it_was() -> None:
    text = "naïve e\u0301 語 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 👩\u200d🚀 \t|\n\u00a0\ufffd"
    assert safe(text) == text
    assert safe(NASTY) == (
        "a\\x1b]0;owned\\x07\\x1b[2Jb\\x9b31mc\\u202eevil\\u2066d\\x08\\x08\\x7f\\x0d\\u2028\\ud800e"
    )


@pytest.mark.parametrize("markup", [True, False])
def test_a_console_shows_all_of_it_and_obeys_none(markup: bool) -> None:
    for value in (NASTY.replace("[", "("), ["x", NASTY], {NASTY: NASTY}):
        out = io.StringIO()
        Console(file=out, width=300).print(value, markup=markup, highlight=True)
        assert not steers(out.getvalue())
        assert "\\x1b" in out.getvalue()


def test_tables_progress_and_patches_in_colour() -> None:
    out = io.StringIO()
    console = Console(file=out, width=300, force_terminal=True, color_system="truecolor")
    table = Table(NASTY, title=NASTY, caption=NASTY)
    table.add_row(NASTY)
    console.print(table)
    text = NASTY.replace("\ud800", "")
    console.print(patched_text(NASTY, [Patch(0, len(text.encode()), text, None)]))
    with Progress(TextColumn("{task.description}"), TextColumn("{task.fields[x]}"), console=console) as progress:
        progress.add_task(NASTY, x=NASTY)
        progress.refresh()
    text = out.getvalue()
    assert "\x1b[" in text  # its own colours
    assert "owned" in text
    assert "\x1b]" not in text
    assert "\x1b[2J" not in text
    assert "\x1b(" not in text
    assert not steers(text) - {"\x1b", "\r"}  # Progress goes back to where its line begins


def test_print_line() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for place in (terminal, pipe):
        print_line(NASTY, place)
    assert terminal.getvalue() == safe(NASTY) + "\n"
    assert pipe.getvalue() == NASTY + "\n"


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error")])
def test_a_log_that_nobody_reads_is_quiet(error: OSError) -> None:
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise error

    console = _LogConsole(file=Gone(), force_terminal=True)
    with Progress(console=console) as progress:
        progress.add_task("a bar")
    console.print("a line")
    assert console.quiet


def test_errors_are_safe_wherever_they_go() -> None:
    assert str(UserError("'a\x1b[2J\x08\u202eb' does not\nexist")) == "'a\\x1b[2J\\x08\\u202eb' does not exist"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_there_is_one_way_to_a_terminal(path: Path) -> None:
    """No console but ours is made, and what is printed elsewhere holds nothing from outside."""
    if path.name in ("terminal.py", "log.py"):
        return
    tree = ast.parse(path.read_text())
    names = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "Console" or names["Console"] == "bytelatent.log", f"line {node.lineno}"
            if node.func.id == "print":
                line = f"{path.relative_to(ROOT)}: {ast.unparse(node)}"
                assert "safe(" in line or line.split(":")[0] in NOTHING_FROM_OUTSIDE, line


NOTHING_FROM_OUTSIDE = {  # numbers, and names that are ours
    "launch/torchrun.py",
    "training/distributed/ranks.py",
}


def on_a_terminal(*arguments: str, given: bytes = b"") -> tuple[int, bytes]:
    """What a command sends to a terminal on which it runs, and its exit code."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "200"}
    name = os.ttyname(theirs)
    command = [sys.executable, "-m", "bytelatent.cli", *arguments]
    process = Command(command, environment, streams={1: name, 2: name}, given=given)
    process.wait(timeout=60)
    os.close(theirs)
    sent = b""
    with suppress(OSError):  # nobody writes any more
        while new := os.read(ours, 65536):
            sent += new
    os.close(ours)
    assert process.returncode is not None
    return process.returncode, sent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = tiny_blt()
    folder = tmp_path_factory.mktemp("model") / "m"
    patching = PatchSettings(mode="space")
    BLT(network, Config(model=network.settings, context=64, patching=patching), None).save_pretrained(folder)
    return folder


RAW = b"a\x1b]0;owned\x07b\x1b[2Jc\x9b31md\x08\xe2\x80\xaee"


def raw(sent: bytes) -> bool:
    """Whether what RAW holds came as it is; rich's own sequences are of colours alone."""
    text = sent.decode("utf-8", "replace")
    return bool(steers(text) - {"\r", "\x1b"}) or "\x1b]" in text or "\x1b[2J" in text


def test_generate_sends_a_terminal_nothing_raw_and_a_pipe_all(model: Path) -> None:
    arguments = ["generate", "-m", str(model), "-n", "40", "--temperature", "3", "--file"]
    prompt = model.parent / "prompt.txt"
    prompt.write_bytes(RAW + b" and plain text" * 10)  # with so few control characters it is no binary file
    code, sent = on_a_terminal(*arguments, str(prompt))
    assert code == 0
    assert not raw(sent)
    assert b"a\\x1b]0;owned\\x07b\\x1b[2Jc" in sent
    file = model.parent / "piped"
    file.touch()
    piped = [sys.executable, "-m", "bytelatent.cli", *arguments, str(prompt)]
    Command(piped, {**os.environ, "OMP_NUM_THREADS": "1"}, streams={1: str(file)}).wait(timeout=60)
    assert file.read_bytes().startswith(RAW)


def test_rows_and_errors_and_patches_on_a_terminal(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "x", "title": "\\u009b31m\\u202e\\u007f"}\n')
    named = tmp_path / "a\x1b]0;owned\x07\u202eb"
    for code, sent in (
        on_a_terminal("generate", "-m", str(model), "-n", "5", "--jsonl", str(rows)),
        on_a_terminal("generate", "x", "-m", str(named)),
        on_a_terminal("eval", str(named), "-m", str(model)),
        on_a_terminal("runs", str(named)),
        on_a_terminal("patch", "-m", str(model), given=RAW),
        on_a_terminal("generate", "x", "--seed", "\x1b]0;owned\x07"),
        on_a_terminal("generate", "x", "--\x1b]0;owned\x07"),
        on_a_terminal("\x1b]0;owned\x07"),
    ):
        assert code in (0, 2)
        assert sent
        assert not raw(sent), sent
