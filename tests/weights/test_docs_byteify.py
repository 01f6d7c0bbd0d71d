"""The commands of docs/byteify.md, in their order, with a small model in place of the one on the hub."""

import json
import shlex
from pathlib import Path

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from bytelatent.cli import app
from bytelatent.weights import Config, StoredModel, load, write_model
from tests.model.tiny import tiny_byte_lm
from tests.test_docs import snippets
from tests.weights.test_byteify import SIZES

SMALL = {
    "steps=20000": "steps=2",
    "data.context=4096": "data.context=64",
    "data.batch_bytes=65536": "data.batch_bytes=128",
}


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained("Qwen/Qwen2.5-0.5B")
    byte_lm = tiny_byte_lm()
    Path("runs").mkdir()
    write_model(StoredModel.of(byte_lm, Config(model=byte_lm.settings, context=64)), Path("runs/mine"), "native")
    Path("text").mkdir()
    for part in ("train", "valid"):
        line = json.dumps({"text": "the cat sat on the mat and went over it again"})
        Path(f"text/{part}.jsonl").write_text(f"{line}\n" * 9)
    lines = "".join(snippets("docs/byteify.md", "bash")).replace("\\\n", " ").splitlines()
    assert len(lines) == 6
    for line in lines:
        arguments = [SMALL.get(part, part) for part in shlex.split(line)[1:]]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    before, after = (load(folder).model.state_dict() for folder in ("qwen-bytes", "runs/qwen-bytes"))
    moved = {name: float((after[name] - weight).abs().max()) for name, weight in before.items()}
    blocks = {name: by for name, by in moved.items() if name.startswith("global_transformer.stack.")}
    assert all(by > 0 for by in blocks.values())
    assert max(blocks.values()) < 0.2 * max(by for name, by in moved.items() if name not in blocks)
