"""Commands on text as it comes: what is named, what is passed over, and the exit code."""

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytelatent import config
from bytelatent.cli import main
from bytelatent.text.documents import MAX_LINE, forget_logged
from bytelatent.training import train
from tests.text.test_every_reader import CASES, PNG
from tests.text.text_files import jsonl
from tests.training.tiny_runs import byte_lm_run, settings, write_text

Command = Callable[..., tuple[int, str, str]]
GOOD = jsonl([b"good text %d" % row for row in range(9)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte_lm")
    return train(settings(byte_lm_run(folder / "run", write_text(folder / "text.jsonl", seed=0), steps=2)))


@pytest.fixture
def blt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `blt`; gives the exit code, and what it prints on standard output and on standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blt", *map(str, arguments)])
        capsys.readouterr()
        forget_logged()  # as a process of its own
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return int(str(code or 0)), captured.out, captured.err

    return run


def reading(text: Path, model: Path, out: Path) -> dict[str, list[object]]:
    """Each command, on a text."""
    return {
        "prepare": ["prepare", text, "--out", out / "prepared", "--workers", 1],
        "eval": ["eval", text, "-m", model],
        "entropies": ["entropies", text, "-m", model, "--out", out / "entropies"],
        "calibrate": ["calibrate", text, "-m", model, "--patch-bytes", 2],
        "demo": ["demo", "--text", text, "--out", out / "demo", "--minutes", 0.1],
        "train": ["train", f"run={out / 'run'}", "model=demo-byte-lm", f"data.train={text}", "steps=1", "device=cpu"],
    }


VERBS = ["prepare", "eval", "entropies", "calibrate", "demo", "train"]
NO_TEXT = {
    "a.png": (PNG, "a PNG image"),
    "a.arrow": (b"ARROW1\0\0", "an Arrow file"),
    "a.csv": (b"text\na\n", "a CSV or TSV table"),
    "TABLE.TSV.gz": (gzip.compress(b"text\na\n"), "a CSV or TSV table"),
    "a": (b"ab\0cd", "binary data"),
    "no_zeros.txt": (bytes(range(1, 256)), "binary data"),
    "a.pdf": (b"%PDF-1.4 a b c", "a PDF file"),
    "utf16.txt": ("a note".encode("utf-16"), "UTF-16 text"),
    "notes.txt.gz.gz": (gzip.compress(gzip.compress(b"a note")), "gzip inside gzip"),
    "notes.tar.gz": (gzip.compress(b"note".ljust(257, b"\0") + b"ustar\x0000"), "a tar archive"),
    "a.parquet.gz": (gzip.compress(b"PAR1"), "Parquet inside gzip"),
    "manifest.json": (b'{"format": 1, "request": {}}', "the manifest of a prepared folder"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_no_text_is_refused_by_name(verb: str, tmp_path: Path, model: Path, blt: Command) -> None:
    for name, (data, what) in NO_TEXT.items():
        file = tmp_path / name
        file.write_bytes(data)
        code, out, err = blt(*reading(file, model, tmp_path)[verb])
        assert (code, out) == (2, ""), err
        assert len(err.splitlines()) == 1
        assert f"'{file}' is {what}" in err
        assert "which is not read as text" in err


@pytest.mark.parametrize("verb", ["prepare", "eval", "entropies", "calibrate"])
def test_what_is_no_text_is_passed_over_in_a_folder(verb: str, tmp_path: Path, model: Path, blt: Command) -> None:
    (tmp_path / "in").mkdir()
    for name, (data, _) in NO_TEXT.items():
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in" / "good.jsonl").write_bytes(GOOD)
    code, _, err = blt(*reading(tmp_path / "in", model, tmp_path)[verb])
    assert code == 0, err
    lines = [line for line in err.splitlines() if "passed over" in line]
    assert len(lines) == len({what for _, what in NO_TEXT.values()})
    for name, (_, what) in NO_TEXT.items():
        (line,) = [line for line in lines if f"passed over, {what}" in line]
        assert f"'{name}'" in line
        assert len(line) <= MAX_LINE
    assert any("2 of 13 files passed over, binary data: 'a', 'no_zeros.txt'" in line for line in lines)
    (tmp_path / "in" / "good.jsonl").unlink()
    code, _, err = blt(*reading(tmp_path / "in", model, tmp_path / "again")[verb])
    assert code == 2
    assert "none of the 12 files" in err


@pytest.mark.parametrize("verb", ["prepare", "eval", "entropies", "calibrate"])
def test_a_file_of_which_nothing_is_read_ends_in_2(verb: str, tmp_path: Path, model: Path, blt: Command) -> None:
    """After all others were read."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jsonl").write_bytes(GOOD)
    (tmp_path / "in" / "bad.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd no zstd")
    code, out, err = blt(*reading(tmp_path / "in", model, tmp_path)[verb])
    assert code == 2
    assert "nothing of" in err.splitlines()[-1]
    assert "bad.jsonl.zst" in err.splitlines()[-1]
    if verb == "prepare":
        assert f"9 documents, {len(GOOD)} bytes," in err
        assert len(b"".join(file.read_bytes() for file in (tmp_path / "prepared").glob("*.jsonl"))) == len(GOOD)
    if verb == "eval":
        assert out.endswith(f"on {sum(len(json.loads(line)['text']) for line in GOOD.splitlines())} bytes\n")
    if verb == "calibrate":
        assert json.loads(out)["data_bytes"] == sum(len(json.loads(line)["text"]) for line in GOOD.splitlines())
    if verb == "entropies":
        assert [file.name for file in (tmp_path / "entropies").glob("*.parquet")] == ["good.parquet"]


def test_duplicate_columns_are_named(tmp_path: Path, model: Path, blt: Command) -> None:
    for verb in ("prepare", "eval", "entropies", "calibrate"):
        code, _, err = blt(*reading(CASES / "dupcol.parquet", model, tmp_path)[verb])
        assert code == 2
        assert "has 2 columns 'text'" in err.splitlines()[-1]


@pytest.mark.parametrize("verb", ["prepare", "eval", "entropies", "calibrate"])
def test_the_key_of_the_text(verb: str, tmp_path: Path, model: Path, blt: Command) -> None:
    command = reading(CASES / "content.jsonl", model, tmp_path)[verb]
    assert blt(*command)[0] == 2
    command = reading(CASES / "content.jsonl", model, tmp_path / "again")[verb]
    if verb == "calibrate":
        command[-1] = 1
    assert blt(*command, "--text-key", "content")[0] == 0


@pytest.mark.parametrize("verb", ["prepare", "eval", "entropies", "calibrate"])
def test_a_length_beyond_any_row(verb: str, tmp_path: Path, model: Path, blt: Command) -> None:
    command = reading(CASES / "content.jsonl", model, tmp_path)[verb]
    for length in (0, 2**31 - 1, 2**63 - 1, 10**30):
        code, _, err = blt(*command, "--max-row-bytes", length)
        assert code == 2
        assert err.splitlines()[-1].startswith("error: ")
        assert "row" in err.splitlines()[-1]
        assert "cannot be read" not in err


def test_lines_about_bad_rows_are_short_and_can_be_printed(tmp_path: Path, model: Path, blt: Command) -> None:
    folder = tmp_path / "x[" / "red]"
    folder.mkdir(parents=True)
    lines = [
        b'{"te\\ud800xt":"x"}',
        b'{"%s": 1}' % (b"k" * 5000),
        b"{%s}" % b", ".join(b'"key %d": "\\u001b[31m"' % number for number in range(900)),
        b'{"[/bold]": 1}',
        b'{"text": "cut off',
        b'["\\ud800"]',
    ]
    text = folder / "a.jsonl"
    text.write_bytes(GOOD + b"\n".join(lines) + b"\n")
    for verb in ("eval", "entropies", "calibrate"):
        code, _, err = blt(*reading(text, model, tmp_path)[verb])
        assert code == 0, err
        found = [line for line in err.splitlines() if "passed over" in line]
        assert len(found) == len(lines)
        for line in found:
            line.encode()
            assert len(line) <= MAX_LINE
            assert line.isprintable()
    code, _, err = blt(*reading(text, model, tmp_path)["prepare"], "--dedup")
    assert code == 0
    assert all(len(line) <= MAX_LINE for line in err.splitlines() if line.startswith("left out"))
    code, _, err = blt(*reading(text, model, tmp_path)["eval"], "--max-bad-rows", 2)
    assert code == 2
    assert "2 bad rows or files were passed over already (--max-bad-rows)" in err


def test_old_names_of_the_limit(tmp_path: Path, model: Path, blt: Command) -> None:
    text = tmp_path / "a.jsonl"
    text.write_bytes(GOOD + b"bad\nbad\n")
    commands = reading(text, model, tmp_path)
    for verb, old in (("entropies", "--max-damaged"), ("prepare", "--max-corrupt"), ("train", "data.max_damaged")):
        config.warn_renamed.cache_clear()
        given = [f"{old}=1"] if verb == "train" else [old, 1]
        code, _, err = blt(*commands[verb], *given)
        assert code == 2 or verb == "train"  # a step of training may not come that far
        new = "data.max_bad_rows" if verb == "train" else "--max-bad-rows"
        assert f"{old} is now {new}; the old name still works" in err
        assert old not in blt(verb, "--help")[1]


def test_the_prompts_of_generate(tmp_path: Path, model: Path, blt: Command) -> None:
    out = tmp_path / "out.jsonl"
    assert blt("generate", "--jsonl", CASES / "g_raw.jsonl", "-m", model, "-n", 1, "--out", out)[0] == 0
    row = json.loads(out.read_bytes())
    assert row["prompt"] == "caf\udce9"
    (tmp_path / "PROMPTS.json").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}\n')
    for pack in (gzip.compress, bytes):
        file = tmp_path / f"{pack.__name__}.json"
        file.write_bytes(pack((tmp_path / "PROMPTS.json").read_bytes()))
        out = tmp_path / f"{pack.__name__}.out"
        assert blt("generate", "--jsonl", file, "-m", model, "-n", 1, "--out", out)[0] == 0
        assert [json.loads(line)["prompt"] for line in out.read_bytes().splitlines()] == ["a", "b"]
    code, _, err = blt("generate", "--jsonl", CASES / "dict.parquet", "-m", model)
    assert (code, "is not JSONL" in err) == (2, True)


def test_the_prompt_in_a_file(tmp_path: Path, model: Path, blt: Command) -> None:
    prompt = tmp_path / "prompt"
    for data in (b"a note", gzip.compress(b"a note"), b"\xef\xbb\xbfa note"):
        prompt.write_bytes(data)
        code, out, err = blt("generate", "--file", prompt, "-m", model, "-n", 1, "--temperature", 0)
        assert code == 0, err
        assert out.startswith("a note")
    for data, what in [*NO_TEXT.values(), (b"PAR1", "a Parquet file")]:
        if what not in ("a CSV or TSV table", "the manifest of a prepared folder"):  # their names say so
            prompt.write_bytes(data)
            code, out, err = blt("generate", "--file", prompt, "-m", model)
            assert (code, out) == (2, "")
            assert f"'{prompt}' is {what}" in err
    assert "is a folder" in blt("generate", "--file", tmp_path, "-m", model)[2]


def test_names_of_files_that_are_passed_over_fill_one_line(tmp_path: Path, model: Path, blt: Command) -> None:
    folder = tmp_path / "it's"
    folder.mkdir()
    (folder / "good.jsonl").write_bytes(GOOD)
    for number in range(30):
        (folder / f"it's picture {number:02d} {'x' * (number // 29 * 200)}\x1b.png").write_bytes(PNG)
        (folder / f"link {number:02d}").symlink_to(folder)
    code, _, err = blt("eval", folder, "-m", model)
    assert code == 0
    links, pictures = err.splitlines()
    assert "30 passed over, a link to a folder that is read already: 'link 00', 'link 01'" in links
    assert "30 of 31 files passed over, a PNG image: 'it's picture 00" in pictures
    for line in (links, pictures):
        assert len(line) <= MAX_LINE
        assert line.endswith("', ...")
        assert line.isprintable()


def test_an_empty_path_is_not_the_folder_that_one_is_in(tmp_path: Path, model: Path, blt: Command) -> None:
    for verb, command in reading(tmp_path, model, tmp_path).items():
        given = [
            "data.train=" if word == f"data.train={tmp_path}" else "" if word == tmp_path else word for word in command
        ]
        code, _, err = blt(*given)
        assert (code, "path" in err and "empty" in err) == (2, True), (verb, err)
    code, _, err = blt("train", "run=", "model=demo-byte-lm", f"data.train={tmp_path}", "steps=1")
    assert (code, err.startswith("error: run: ")) == (2, True)
    for command in (["entropies", CASES / "bom.jsonl", "-m", model, "--out", ""], ["convert", model, ""]):
        code, _, err = blt(*command)
        assert (code, "the path is empty" in err) == (2, True)


def test_the_bounds_of_a_number_are_exact(blt: Command) -> None:
    assert "seed: Input should be greater than or equal to 0, not -1" in blt("demo", "--seed", -1)[2]


def test_a_broken_link_is_named(tmp_path: Path, model: Path, blt: Command) -> None:
    (tmp_path / "a.txt").symlink_to("nowhere")
    assert f"'{tmp_path / 'a.txt'}' is a broken link" in blt("eval", tmp_path / "a.txt", "-m", model)[2]


def test_a_row_with_something_else_where_text_should_be(tmp_path: Path, model: Path, blt: Command) -> None:
    text = tmp_path / "a.jsonl"
    found = {b"3": "a number", b"null": "null", b"[1]": "a list", b"{}": "an object", b"true": "true or false"}
    text.write_bytes(GOOD + b"\n".join(b'{"text": %s}' % value for value in found))
    code, _, err = blt("eval", text, "-m", model)
    assert code == 0
    for line, what in zip(err.splitlines(), found.values(), strict=False):
        assert f"has no text under 'text' but {what}" in line


def test_a_number_of_many_digits_costs_no_row(tmp_path: Path, model: Path, blt: Command) -> None:
    text = tmp_path / "a.jsonl"
    text.write_bytes(b'{"text": "abc", "n": %s}\n' % (b"9" * 10_000))
    code, out, err = blt("eval", text, "-m", model)
    assert (code, err) == (0, "")
    assert "on 3 bytes" in out


def test_rows_without_the_key_beside_other_text(tmp_path: Path, blt: Command) -> None:
    """One file of another kind of rows does not stop the preparation of a folder."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_bytes(b'{"title": "x"}')
    command = ["prepare", tmp_path / "in", "--workers", 1, "--out"]
    code, _, err = blt(*command, tmp_path / "alone")
    assert (code, "--text-key" in err) == (2, True)
    (tmp_path / "in" / "b.md").write_bytes(b"a note")
    code, _, err = blt(*command, tmp_path / "beside")
    assert code == 0, err
    assert "2 documents" in err


def test_entropies_are_checked_where_they_are_read(tmp_path: Path, model: Path, blt: Command) -> None:
    wrong = [b"[1, NaN, 2]", b"3.2", b"[1, -1, 2]", b"[1, 1e999, 2]", b"[1, 2]", b'"x"', b"[1, null, 2]"]
    lines = [b'{"text": "ab", "entropies": %s}' % values for values in wrong]
    lines += [b'{"text": "ab", "entropies": [1, 2, 3]}'] * 9
    text = tmp_path / "a.jsonl"
    text.write_bytes(b"\n".join(lines))
    assert json.loads(blt("eval", text, "-m", model, "--json")[1])["bad_rows"] == 0
    code, out, err = blt("calibrate", text, "--patch-bytes", 2)
    assert code == 0, err
    assert len([line for line in err.splitlines() if "passed over" in line]) == len(wrong)
    assert json.loads(out)["data_bytes"] == 18


def test_a_broken_column_costs_no_row_and_a_broken_part_only_its_rows(tmp_path: Path, blt: Command) -> None:
    texts = [f"text {row} " * 20 for row in range(60)]
    other = [f"other {row} " * 20 for row in range(60)]
    file = tmp_path / "a.parquet"
    how = {"row_group_size": 20, "compression": "zstd", "use_dictionary": False}
    pq.write_table(pa.table({"text": texts, "other": other}), file, **how)
    about = pq.ParquetFile(file).metadata
    data = bytearray(file.read_bytes())
    for group, column in ((0, 1), (1, 0)):
        chunk = about.row_group(group).column(column)
        data[chunk.data_page_offset + 40 : chunk.data_page_offset + chunk.total_compressed_size] = b"\xff" * (
            chunk.total_compressed_size - 40
        )
    file.write_bytes(data)
    code, _, err = blt("prepare", file, "--out", tmp_path / "out", "--workers", 1, "--chunks", 1)
    assert code == 0, err
    lines = b"".join(out.read_bytes() for out in (tmp_path / "out").glob("*.jsonl")).splitlines()
    assert sorted(json.loads(line)["text"] for line in lines) == sorted(texts[:20] + texts[40:])
    assert "rows 21 to 40 of 60 are not read" in err


def test_a_prepared_folder_is_prepared_again(tmp_path: Path, blt: Command) -> None:
    shutil.copy(CASES / "lines.json", tmp_path)
    assert blt("prepare", tmp_path / "lines.json", "--out", tmp_path / "out", "--workers", 1, "--chunks", 2)[0] == 0
    code, _, err = blt("prepare", tmp_path / "out", "--out", tmp_path / "again", "--workers", 1)
    assert code == 0
    assert "passed over, the manifest of a prepared folder: 'manifest.json'" in err
    assert "50 documents" in err
