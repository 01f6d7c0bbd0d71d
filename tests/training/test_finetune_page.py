"""The commands of docs/finetune.md, with tiny weights in the released format in place of the 1B."""

import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bytelatent.cli import app
from bytelatent.command_line import from_command_line
from bytelatent.config import load_yaml
from bytelatent.training import TrainSettings, read_metrics
from bytelatent.weights import open_pretrained
from tests.test_docs import snippets
from tests.training.tiny_runs import write_text
from tests.weights.published import write_published

PAGE = "docs/finetune.md"
SMALL = ["steps=4", "data.context=64", "data.batch_bytes=512", "optimizer.accumulation=1", "optimizer.lr=1e-2"]
SMALL += ["optimizer.warmup_steps=0", "device=cpu", "dtype=float32"]


def commands(snippet: str) -> list[list[str]]:
    lines = snippet.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("blt ")]


@pytest.fixture
def released(tmp_path: Path, goldens: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model as `facebook/blt-1b`, with its entropy model beside it, in a folder with text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-text").mkdir()
    write_text(tmp_path / "my-text" / "some.jsonl", seed=0, num_documents=200)
    write_published(goldens / "entropy", tmp_path / "released" / "blt-entropy")
    return str(write_published(goldens / "blt_k2", tmp_path / "released" / "blt-1b").relative_to(tmp_path))


def run(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_six_commands(released: str) -> None:
    six, decoder_only = snippets(PAGE, "bash")
    found = [[part.replace("facebook/blt-1b", released) for part in command] for command in commands(six)]
    assert [command[0] for command in found] == ["prepare", "eval", "train", "eval", "generate", "convert"]
    for command in found:
        more = {"train": SMALL, "eval": ["--context", "64", "--device", "cpu"], "generate": ["-n", "8"]}
        output = run([*command, *more.get(command[0], [])])
        if command.count("--model") == 2:
            assert "runs/mine" in output
            assert released in output
    rows = [row for row in read_metrics(Path("runs/mine/metrics.jsonl")) if "validation_bits_per_byte" in row]
    assert [row["step"] for row in rows] == [0, 4]
    assert rows[1]["validation_bits_per_byte"] < rows[0]["validation_bits_per_byte"] - 0.1  # it got better
    assert open_pretrained("mine-hf").byte_lm is not None
    [command] = commands(decoder_only)
    run([*(part.replace("facebook/blt-1b", released) for part in command), *SMALL])
    before, after = open_pretrained(released).tensors, open_pretrained("runs/decoder_only").tensors
    for name, tensor in after.items():
        assert tensor.load().equal(before[name].load().float()) == (not name.startswith("decoder.")), name


def test_the_settings_of_the_page(released: str, tmp_path: Path) -> None:
    [two_lines] = snippets(PAGE, "yaml")
    assert two_lines.count("\n") == 2
    values = yaml.safe_load(two_lines)
    values["init"] = released
    path = tmp_path / "byteified.yaml"
    path.write_text(yaml.safe_dump(values))
    asked = from_command_line(TrainSettings, [f"config={path}", "data.train=my-text", "steps=1"], "")
    assert asked.optimizer.lr_scale.global_transformer == 0.1
    text = Path(__file__).parents[2].joinpath(PAGE).read_text()
    sources = next(part for part in shlex.split(text.split("helps:\n")[1].split("`")[1]))
    mixed = from_command_line(TrainSettings, ["config=finetune", f"init={released}", sources], "")
    assert [source.weight for source in mixed.data.train] == [3.0, 1.0]
    mixed = load_yaml(Path(__file__).parents[2] / "apps/bytelatent/configs/finetune.yaml")
    assert f"{mixed['optimizer']['lr']:g}" == "2e-05"
    assert "begins with 2e-5" in text
