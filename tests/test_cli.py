"""The command `blt`, as a person meets it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bytelatent import BLT
from bytelatent.cli import app, main
from bytelatent.model import PRESETS, build_model
from bytelatent.training import train
from bytelatent.vocab import to_bytes
from bytelatent.weights import load
from tests import processes
from tests.processes import CLOSED
from tests.training.tiny_runs import blt_run, byte_lm_run, settings, write_text

VERBS = [
    "demo",
    "prepare",
    "entropies",
    "train",
    "configs",
    "runs",
    "launch",
    "calibrate",
    "eval",
    "generate",
    "patch",
    "serve",
    "convert",
    "export",
]
VERBS += ["byteify", "chat", "info", "tokenizer", "study", "speedrun"]
IMPORT_TORCH = ["patch words --mode space", "info demo-blt"]  # not in an interpreter of their own: it takes seconds
NO_UTF8 = b"caf\xc3\xa9 \xff\xfe \x1b[31m and\nmore"
BLT_COMMAND = [sys.executable, "-m", "bytelatent.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", seed=0)


@pytest.fixture(scope="module")
def byte_lm(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    return train(settings(byte_lm_run(tmp_path_factory.mktemp("byte_lm") / "run", text)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text: Path, byte_lm: Path) -> Path:
    return train(settings(blt_run(tmp_path_factory.mktemp("blt") / "run", text, byte_lm)))


def blt(*arguments: object, given: bytes = b"") -> bytes:
    """What `blt` prints, in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout_bytes


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on standard error with which `blt` ends with code 2."""
    monkeypatch.setattr(sys, "argv", ["blt", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: ")
    return captured.err


def test_help_lists_every_verb() -> None:
    shown = blt("--help").decode()
    assert all(verb in shown for verb in VERBS)
    assert {command.name for command in app.registered_commands} == {*VERBS}


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_an_example(verb: str) -> None:
    shown = " ".join(blt(verb, "--help").decode().split())
    assert "Example:" in shown
    assert f"blt {verb}" in shown


def test_importing_the_command_is_light() -> None:
    code = "import sys, bytelatent.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0


def test_the_real_command_patches_standard_input() -> None:
    command = [*BLT_COMMAND, "patch", "--mode", "space,static:4,byte"]
    ended = subprocess.run(command, input=NO_UTF8, env=ENVIRONMENT, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    shown = ended.stdout.decode()
    assert f"byte: {len(NO_UTF8)} patches over {len(NO_UTF8)} bytes, 1.00 bytes per patch" in shown
    assert "static:4: " in shown
    assert "space: " in shown
    assert "\x1b" not in shown


def test_the_real_command_ends_with_code_2_and_one_line() -> None:
    ended = processes.ended([*BLT_COMMAND, "patch", "x", "--mode", "spice"], ENVIRONMENT)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: patch: no mode 'spice'; modes: ")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["patch", "generate", "published"])
def test_a_closed_pipe_is_no_traceback(command: str, byte_lm: Path, tmp_path: Path) -> None:
    arguments = {
        "patch": [*BLT_COMMAND, "patch", "word " * 20_000, "--mode", "space"],
        "generate": [*BLT_COMMAND, "generate", "x", "-m", str(byte_lm), "-n", "300"],
        "published": [sys.executable, "-m", "bytelatent.generate", f"model={byte_lm}", "prompt=x", "max_new_bytes=300"],
    }[command]
    if command != "patch":  # which starts an interpreter of its own, and sees it end
        os.mkfifo(tmp_path / "pipe")
        forked = processes.Command(arguments, ENVIRONMENT, streams={1: str(tmp_path / "pipe")})
        with open(tmp_path / "pipe", "rb") as pipe:
            assert len(pipe.read(1)) == 1
        assert forked.communicate(timeout=60)[1] == ""
        return
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert len(process.stdout.read(1)) == 1
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert errors == b""


@pytest.mark.parametrize("arguments", ["--version", "patch --help", "patch words --mode space", "info demo-blt"])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error(arguments: str, closed: str) -> None:
    command = [*BLT_COMMAND, *arguments.split()]
    if arguments in IMPORT_TORCH:
        streams = {number: CLOSED for number, sign in enumerate(("<&-", ">&-", "2>&-")) if sign in closed.split()}
        ended = processes.ended(command, ENVIRONMENT, streams=streams)
    else:
        shell = ["bash", "-c", f'"$@" {closed}', "", *command]
        ended = subprocess.run(shell, env=ENVIRONMENT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert bool(ended.stdout) == (" >&-" not in f" {closed}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device is of Linux")
@pytest.mark.parametrize("arguments", ["--version", "patch --help", "patch words --mode space", "info demo-blt"])
def test_output_that_cannot_be_written(arguments: str) -> None:
    command = [*BLT_COMMAND, *arguments.split()]
    if arguments in IMPORT_TORCH:
        ended = processes.ended(command, ENVIRONMENT, streams={1: "/dev/full"})
    else:
        with open("/dev/full", "w") as full:
            ended = subprocess.run(command, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: the output cannot be written: No space left on device\n"


def test_patches_as_json_cover_the_text(model: Path) -> None:
    found = json.loads(blt("patch", "--json", "--mode", "entropy,space,static:4", "-m", model, given=NO_UTF8))
    assert found.keys() == {"entropy", "space", "static:4"}
    for name, patches in found.items():
        assert [patch["start"] for patch in patches] == [0, *(patch["end"] for patch in patches[:-1])]
        assert patches[-1]["end"] == len(NO_UTF8)
        assert all(
            patch["text"] == NO_UTF8[patch["start"] : patch["end"]].decode(errors="replace") for patch in patches
        )
        assert all((patch["entropies"] is not None) == (name == "entropy") for patch in patches)
    assert all(len(p["entropies"]) == p["end"] - p["start"] for p in found["entropy"])
    assert [patch["text"] for patch in found["space"]][-1] == "more"


def test_patches_as_a_page(tmp_path: Path, model: Path) -> None:
    page = tmp_path / "pages" / "patches.html"
    page.parent.mkdir()
    printed = blt("patch", "some <b>text</b>", "--mode", "entropy,space", "--html", page, "-m", model)
    assert printed.decode().strip() == str(page)
    assert os.listdir(page.parent) == ["patches.html"]
    assert "</html>" in page.read_text()
    assert "<b>text</b>" not in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["patch", "x", "--mode", "static"], "no mode 'static'"),
        (["patch", "x", "--mode", "static:0"], "static:0: patch_size"),
        (["patch", "x", "--mode", "entropy:high"], "entropy:high: threshold: Input should be a valid number"),
        (["patch", "x", "--mode", "bpe:absent.json"], "absent.json"),
        (["patch", "x", "-m", "absent"], "'absent' is not a folder; name a run"),
        (["patch", "x", "-m", "absent"], "take modes that need no model: --mode space,static:4"),
        (["patch", "x", "-m", "absent", "--mode", "entropy,space"], "need no model: --mode space"),
        (["generate", "x", "-m", "absent"], "'absent' is not a folder"),
        (["generate", "x", "-m", "{model}", "--top-p", "0"], "top_p"),
        (["generate", "x", "-m", "{model}", "--device", "gpu"], "device: 'gpu' is not known"),
        (["generate", "x", "-m", "absent", "--draft-length", "8"], "draft_length: speculative decoding was removed"),
        (["generate", "x", "-m", "absent", "--ahead", "8"], "ahead: speculative decoding was removed"),
        (["serve", "absent", "--draft-length", "8"], "draft_length: speculative decoding was removed"),
        (["generate", "x", "-m", "absent", "--quantize", "int4"], "quantize: Input should be 'full', 'int8' or 'fp8'"),
        (["generate", "x", "-m", "absent", "-n", str(10**20)], f"or equal to 1000000000, not {10**20}"),
        (["generate", "x", "-m", "absent", "--samples", str(10**20)], f"or equal to 100000, not {10**20}"),
        (["generate", "x", "-m", "absent", "--samples", "0"], "samples: Input should be greater than or equal to 1"),
        (
            ["generate", "x", "-m", "absent", "--batch-size", "-1"],
            "batch_size: Input should be greater than or equal to 1",
        ),
        (["generate", "x", "-m", "absent", "-n", "-5"], "max_new_bytes: Input should be greater than or equal to 1"),
        (["generate", "x", "-m", "absent", "--temperature", "nan"], "sampling.temperature: Input should be"),
        (["generate", "x", "-m", "absent", "--temperature", "-1"], "sampling.temperature: Input should be greater"),
        (["generate", "x", "-m", "absent", "--top-k", "0"], "sampling.top_k: Input should be greater"),
        (["generate", "x", "-m", "absent", "--top-p", "1.5"], "sampling.top_p: Input should be less"),
        (["generate", "x", "-m", "absent", "--min-p", "nan"], "sampling.min_p: Input should be"),
        (["generate", "x", "-m", "absent", "--seed", str(2**64)], "sampling.seed: Input should be less"),
        (["generate", "x", "-m", "{model}", "--out", "out.jsonl"], "out: it goes with jsonl"),
        (["generate", "x", "-m", "{model}", "--log-probabilities"], "log_probabilities: it goes with jsonl"),
        (["generate", "--jsonl", "{text}", "-m", "absent", "--out", "."], "out: '.' is a folder; name a file"),
        (["eval", "{text}", "-m", "absent"], "'absent' is not a folder"),
        (["eval", "absent.txt", "-m", "{model}"], "'absent.txt' does not exist"),
        (
            ["eval", "{text}", "-m", "{model}", "--max-bytes", "0"],
            "max_bytes: Input should be greater than or equal to 1",
        ),
        (
            ["eval", "{text}", "-m", "absent", "--max-bytes", "-5"],
            "max_bytes: Input should be greater than or equal to 1",
        ),
        (["demo", "--minutes", "nan"], "minutes: Input should be a finite number, not nan"),
        (["demo", "--minutes", "-1"], "minutes: Input should be greater than or equal to 0.1, not -1.0"),
        (["demo", "--seed", "-1"], "seed: Input should be greater than or equal to 0, not -1"),
        (
            ["calibrate", "{text}", "-m", "absent", "--patch-bytes", "inf"],
            "patch_bytes: Input should be a finite number, not inf",
        ),
        (
            ["entropies", "{text}", "-m", "{byte_lm}", "--out", "o", "--context", str(10**12)],
            "context: Input should be",
        ),
        (
            ["entropies", "{text}", "-m", "{byte_lm}", "--out", "o", "--starts", "nan"],
            "threshold: Input should be a fi",
        ),
        (["prepare", "{text}", "--out", "o", "--memory", "nan"], "memory: Input should be a finite number"),
        (["prepare", "{text}", "--out", "o", "--chunks", str(10**12)], "chunks: Input should be less than"),
        (["prepare", "{text}", "--out", "o", "--workers", str(10**12)], "workers: Input should be less than"),
        (["info", "blt-1b", "--patch-bytes", "inf"], "patch_bytes: Input should be a finite number"),
        (
            ["export", "{model}", "--out", "o", "--step", "-1"],
            "step: Input should be greater than or equal to 1",
        ),
        (["launch", "--config", "debug", "--nodes", str(10**12), "--dry-run"], "nodes: Input should be less than"),
        (["train", "config=debug", "model.encoder.num_layers=9999"], "model.encoder.num_layers: Input should be less"),
        (["train", "config=debug", f"model.global_transformer.dim={10**12}"], "model.global_transformer.dim: Input sh"),
        (["calibrate", "absent.txt", "-m", "{byte_lm}"], "'absent.txt' does not exist"),
        (["calibrate", "{text}", "-m", "{byte_lm}", "--patch-bytes", "9999"], "out of reach"),
        (["calibrate", "{text}"], "needs a byte LM or entropies stored beside every text; name the byte LM: --model"),
        (["calibrate", "nowhere", "--figure", "a.gif"], "end in one of .png"),  # before anything is read
        (["calibrate", "{text}", "-m", "{byte_lm}", "--patch-bytes", "3", "--figure", "a.gif"], "end in one of .png"),
        (["info", "blt-1bb"], "did you mean 'blt-1b'?"),
        (["info", "nonsense"], "no preset 'nonsense'. Presets: demo-byte-lm, "),
        (["info", "nonsense"], "blt-8b; or name a run, a folder with a model, or OWNER/NAME on the hub"),
        (["info"], "name a run, a folder, a repository or a preset; presets: "),
        (["info", "{model}", "--entropy-model", "absent"], "'absent' is not a folder"),
        (["info", "{byte_lm}", "--entropy-model", "{byte_lm}"], "is a byte LM itself and needs no other"),
        (["info", "{model}", "--revision", "main"], "is a folder, which has no revisions; leave it out"),
        (["convert", "absent", "out"], "'absent' is not a folder; name a run"),
        (["convert", "{model}", "out", "--to", "gguf"], "format: 'gguf' is unknown; use native, hf, meta"),
        (["convert", "{model}", "out", "--licence", ""], "licence: it is empty"),
        (["convert", "absent", "{text}"], "text.jsonl' is a file; name a folder"),
        (["convert", "{model}", "out", "--entropy-model", "absent"], "error: entropy_model: 'absent' is not a folder"),
        (["train"], "name a configuration or settings: blt train config="),
        (
            ["train", "config=absent.yaml"],
            "'absent.yaml' does not exist; name a YAML file, or one that `blt configs` l",
        ),
        (["train", "config=debag"], "'debag' does not exist; did you mean 'debug'?; name a YAML file"),
        (["configs", "debag"], "'debag' does not exist; did you mean 'debug'?; name a YAML file"),
        (["train", "steps=3", "stepz=4"], "stepz: unknown key; did you mean 'steps'?"),
        (["launch", "--nodes", "2"], "name a script and its settings"),
        (["launch", "--config", "absent.yaml"], "'absent.yaml' does not exist"),
        (["demo", "--text", "absent", "--out", "absent/demo"], "'absent' does not exist"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_what_will_not_do_is_one_line_and_code_2(
    arguments: list[str],
    message: str,
    text: Path,
    byte_lm: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(text=text, byte_lm=byte_lm, model=model) for argument in arguments]
    assert message in refused(monkeypatch, capsys, *filled)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("pach x", "no command 'pach'; did you mean 'patch'?; all commands: blt --help"),
        ("bench trian", "no command 'trian'; did you mean 'train'?; all commands: blt bench --help"),
        ("patch x --mod space", "no option '--mod'; did you mean '--mode'?; see: blt patch --help"),
        ("patch x --hel", "no option '--hel'; did you mean '--help'?; see: blt patch --help"),
        ("patch x -z", "no option '-z'; see: blt patch --help"),
        (
            "bench train --checkpoint full",
            "no option '--checkpoint'; did you mean '--checkpointing'?; see: blt",
        ),
        ("--verson", "no option '--verson'; did you mean '--version'?; see: blt --help"),
        ("patch x --mode", "option '--mode' requires an argument; see: blt patch --help"),
        ("eval a --json=3", "option '--json' does not take a value; see: blt eval --help"),
        ("generate x -n abc", "--max-new-bytes / -n: Input should be a valid integer, "),
        ("generate x -n abc", ", not 'abc'; see: blt generate --help"),
        ("generate x -n1.5", ", not '1.5'; see: blt generate --help"),
        ("generate x --max-new-bytes=\x1b[2J", ", not '\\x1b[2J'; see: blt generate --help"),
        ("convert a", "missing argument 'target'; see: blt convert --help"),
        ("prepare a", "missing option '--out'; see: blt prepare --help"),
        ("info blt-1b more", "got unexpected extra argument(s) (more); see: blt info --help"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refused(monkeypatch, capsys, *arguments.split())


@pytest.mark.parametrize("verb", VERBS)
def test_an_option_that_no_verb_has(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = refused(monkeypatch, capsys, verb, "--no-such-thing", "1")
    assert shown.startswith("error: no option '--no-such-thing'")
    assert shown.endswith(f"; see: blt {verb} --help\n")


def test_a_byte_lm_that_is_not_there_is_named_by_its_key(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = blt_run(tmp_path / "run", text, Path("absent"))
    arguments = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    shown = refused(monkeypatch, capsys, "train", *arguments)
    assert shown.startswith("error: entropy_model: 'absent' is not a folder; name a run")


def test_help_of_training_names_the_page_of_settings() -> None:
    shown = " ".join(blt("train", "--help").decode().split())
    assert "docs/settings.md" in shown
    assert shown.count("blt train config=") == 2


def test_info_of_a_preset_is_what_its_modules_hold() -> None:
    found = json.loads(blt("info", "demo-blt", "--json"))
    parameters = sum(parameter.numel() for parameter in build_model(PRESETS["demo-blt"]).parameters())
    assert found["num_parameters"] == parameters == sum(part["num_parameters"] for part in found["parts"])
    longer = json.loads(blt("info", "demo-blt", "--json", "--patch-bytes", "9"))
    assert longer["flops_per_byte"] < found["flops_per_byte"]


def test_info_of_the_1b_preset() -> None:
    found = json.loads(blt("info", "blt-1b", "--json"))
    parts = {part["name"]: part["num_parameters"] for part in found["parts"]}
    # 25 layers of width 2048: four square matrices, and three to the feed-forward width of 5632; two norms each.
    assert parts["global transformer"] == 25 * (4 * 2048**2 + 3 * 2048 * 5632 + 2 * 2048)
    assert parts["n-gram hash tables"] == 6 * 500_002 * 1024
    assert "blt-1b" in blt("info", "blt-1b").decode()


def test_info_of_a_run(model: Path) -> None:
    found = json.loads(blt("info", model, "--json"))
    loaded = load(model)
    assert loaded.byte_lm is not None
    weights = [*loaded.model.parameters(), *loaded.byte_lm.parameters()]
    assert found["num_parameters"] == sum(parameter.numel() for parameter in weights)
    assert found["patching"] == loaded.config.patching.plain() if loaded.config.patching else None


def test_train_then_train_further(tmp_path: Path, text: Path) -> None:
    values = byte_lm_run(tmp_path / "run", text, steps=3)
    arguments = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    assert blt("train", *arguments).decode().splitlines()[-1] == str(tmp_path / "run")
    blt("train", *arguments, "steps=5")
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()


def test_eval(model: Path, byte_lm: Path, text: Path) -> None:
    num_bytes = sum(len(json.loads(line)["text"]) for line in text.read_text().splitlines())
    found = json.loads(blt("eval", text, "-m", model, "--json"))
    assert found["num_bytes"] == num_bytes
    assert 0 < found["bits_per_byte"] < 9
    printed = blt("eval", text, "-m", model).decode()
    assert printed.startswith(f"{found['bits_per_byte']:.4f} bits per byte on {num_bytes:,} bytes")
    assert "bytes per patch" in printed
    of_byte_lm = json.loads(blt("eval", text, "-m", byte_lm, "--json", "--max-bytes", 500))
    assert of_byte_lm["num_bytes"] == 500
    assert of_byte_lm["mean_patch_bytes"] is None


def test_a_byte_lm_stored_in_bfloat16_computes_in_float32(model: Path, text: Path, tmp_path: Path) -> None:
    loaded = BLT.from_pretrained(model, device="cpu")
    assert loaded.byte_lm is not None
    for dtype, name in ((torch.bfloat16, "half"), (torch.float32, "whole")):  # the same values
        loaded.byte_lm.to(dtype)
        loaded.save_pretrained(tmp_path / name)
    bits = [
        json.loads(blt("eval", text, "-m", tmp_path / name, "--json"))["bits_per_byte"] for name in ("half", "whole")
    ]
    assert bits[0] == bits[1]
    texts = [blt("generate", "The cat", "-m", tmp_path / name, "-n", 60) for name in ("half", "whole")]
    assert texts[0] == texts[1]


def test_calibrate(byte_lm: Path, model: Path, text: Path) -> None:
    found = json.loads(blt("calibrate", text, "-m", byte_lm, "--patch-bytes", 5, "--max-bytes", 2000))
    assert found["mean_patch_bytes"] == pytest.approx(5, rel=0.05)
    assert json.loads(blt("calibrate", text, "-m", model, "--patch-bytes", 5, "--max-bytes", 2000)) == found


def test_calibrate_draws(byte_lm: Path, text: Path, tmp_path: Path) -> None:
    figure = tmp_path / "pictures" / "sizes.png"
    blt("calibrate", text, "-m", byte_lm, "--patch-bytes", 3, "--max-bytes", 2000, "--figure", figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in figure.parent.iterdir()] == ["sizes.png"]


def test_rows_that_are_done_survive_ctrl_c(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bytelatent.commands import generate as module
    from bytelatent.errors import Interrupted

    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"prompt": "a", "max_new_bytes": 2}\n{"prompt": "b", "max_new_bytes": 50}\n')
    write = module._write

    def interrupted(file: Any, data: bytes) -> None:
        write(file, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", interrupted)
    settings = module.GenerateSettings(model=str(model), jsonl=str(rows), out=out)
    with pytest.raises(Interrupted, match=r"the rows so far are in '.*out.jsonl.part'"):
        module.generate(settings, io.BytesIO())
    assert not out.exists()
    [line] = (tmp_path / "out.jsonl.part").read_text().splitlines()
    assert json.loads(line)["prompt"] == "a"


@pytest.mark.parametrize("which", ["model", "byte_lm"])
def test_generate(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    once = blt("generate", "The cat", "-m", folder, "-n", 12, "--seed", 3)
    assert once.startswith(b"The cat")
    assert once.endswith(b"\n")
    # A byte that is no UTF-8 shows as one character.
    assert len("The cat") + 1 < len(once.decode()) <= len("The cat") + 12 + 1
    assert blt("generate", "The cat", "-m", folder, "-n", 12, "--seed", 3) == once
    assert blt("generate", "The cat", "-m", folder, "-n", 12, "--seed", 4) != once
    greedy = [blt("generate", "The cat", "-m", folder, "-n", 5, "--temperature", 0, "--seed", s) for s in (1, 2)]
    assert greedy[0] == greedy[1]
    shown = [blt("generate", "The", "-m", folder, "-n", 40, "--quantize", kind) for kind in ("full", "full", "fp8")]
    assert shown[0] == shown[1] != shown[2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "temperature": -1}, "temperature: "),
        ({"prompt": "x", "max_new_bytes": True}, "max_new_bytes: True is not a number from 1 to 1,000,000,000"),
        ({"prompt": "x", "max_new_bytes": 2.5}, "max_new_bytes: 2.5 is not a number from 1 to"),
        ({"prompt": "x", "max_new_bytes": 10**9 + 1}, "max_new_bytes: 1000000001 is not a number from 1 to"),
    ],
)
def test_a_row_that_is_refused_is_named_by_its_line_before_a_model_is_read(
    row: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{{"prompt": "first"}}\n\n{json.dumps(row)}\n')
    shown = refused(monkeypatch, capsys, "generate", "--jsonl", rows, "-m", "absent")
    assert f"{rows}: line 3: {message}" in shown


def test_generate_writes_into_a_device_and_leaves_it_one(model: Path, tmp_path: Path) -> None:
    pipe, rows = tmp_path / "pipe", tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "The cat"}\n')
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        blt("generate", "--jsonl", rows, "-m", model, "-n", 3, "--out", pipe)
        assert json.loads(os.read(reader, 4096))["prompt"] == "The cat"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_info_breaks_no_line_of_the_shape() -> None:
    lines = blt("info", "blt-1b").decode().splitlines()
    assert any(line.startswith("global transformer: ") and line.endswith("theta 500000") for line in lines)
    assert lines[-1].endswith("training costs three times it")


def test_generate_from_bytes_that_are_no_utf8(model: Path) -> None:
    assert blt("generate", "-m", model, "-n", 2, given=NO_UTF8).startswith(NO_UTF8)


def test_an_argument_that_is_no_utf8_is_its_bytes() -> None:
    argument = os.fsdecode(b"a\xff b")
    patches = json.loads(blt("patch", argument, "--mode", "space", "--json"))["space"]
    assert patches[-1]["end"] == len(to_bytes(argument)) == 4
