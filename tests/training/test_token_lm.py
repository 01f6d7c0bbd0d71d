"""Runs of token LMs: batches of ids, measured in bytes; resumed, divided, exported, measured again by hand."""

import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bytelatent import BLT
from bytelatent.commands.export import export_checkpoint
from bytelatent.commands.info import describe
from bytelatent.commands.options import InfoSettings
from bytelatent.data import Loader
from bytelatent.errors import UserError
from bytelatent.model import TokenLM, pack_rows
from bytelatent.model.flops import costs
from bytelatent.report.runs import compare_runs
from bytelatent.text import read_documents
from bytelatent.text.tokenizer import TOKENIZER, Tokenizer, train_tokenizer
from bytelatent.training import read_metrics, train
from bytelatent.weights import load
from tests.training.crew import Crew
from tests.training.plans import train_as
from tests.training.test_resume import cut_off
from tests.training.tiny_runs import STACK, assert_equal_runs, byte_lm_run, settings

MODEL = {"kind": "token_lm", **STACK, "vocab_size": 320}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / TOKENIZER
    path.write_text(train_tokenizer((document.text for _, document in read_documents(str(text))), 300))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path, tokenizer: Path) -> Path:
    return train(settings(values(tmp_path_factory.mktemp("whole") / "run", text, tokenizer)))


def values(run: Path, text: Path, tokenizer: Path, **more: Any) -> dict[str, Any]:
    data = {"valid": str(text), "context": 24, "batch_bytes": 2500, "tokenizer": str(tokenizer), **more.pop("data", {})}
    own = {"model": MODEL, "data": data, "validation": {"every": 7, "max_bytes": None}}
    return byte_lm_run(run, text, 7, **{**own, **more})


def test_batches_know_their_bytes(text: Path, tokenizer: Path) -> None:
    data = settings(values(Path("x"), text, tokenizer, data={"batch_bytes": 64})).data
    vocabulary = Tokenizer.read(tokenizer)
    loader = Loader(data, 0, vocabulary=vocabulary)
    for _ in range(5):
        batch = next(loader)
        assert len(batch.targets) == batch.num_targets == 64
        written = vocabulary.decode(batch.targets.tolist())
        assert batch.num_bytes == len(written) > 64
        assert batch.num_patches == int((batch.targets >= 4).sum())
    resumed = Loader(data, 0, vocabulary=vocabulary)
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(next(resumed).targets, next(loader).targets)
    [reader] = loader.pool.readers
    block, same = reader(str(text), 0), pickle.loads(pickle.dumps(reader))(str(text), 0)  # as another process reads it
    assert block is not None
    pieces = [piece.ids for document in block.documents for piece in document]
    assert np.concatenate(pieces).tolist() == np.concatenate([p.ids for d in same.documents for p in d]).tolist()
    assert pieces[0].dtype == np.uint16


@torch.no_grad()
def test_bits_per_byte_are_those_of_the_text(whole: Path, text: Path) -> None:
    """Piece by piece, by hand, with the model and the tokenizer that the run's folder holds."""
    found = load(whole)
    assert isinstance(found.model, TokenLM)
    nats, num_bytes = 0.0, 0
    for _, document in read_documents(str(text)):
        ids = torch.from_numpy(found.vocabulary.encode(document.text))
        num_bytes += len(document.text)
        for begin in range(0, len(ids) - 1, 24):  # a batch holds all of it, and cuts none
            piece = ids[begin : begin + 25]
            logits = found.model.double()(pack_rows([piece[:-1]])).double()
            nats -= float(logits.log_softmax(-1).gather(1, piece[1:, None]).sum())
    last = [row for row in read_metrics(whole / "metrics.jsonl") if "validation_bits_per_byte" in row][-1]
    assert last["validation_bytes"] == num_bytes
    assert last["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_goes_on_bit_for_bit(
    whole: Path, text: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.json"
    shutil.copyfile(tokenizer, own)
    asked = values(tmp_path / "run", text, own)
    cut_off(asked, 6, monkeypatch)
    own.write_text(train_tokenizer([b"another text"] * 3, 270))
    with pytest.raises(
        UserError, match=r"own\.json' is not the one that '.*run' was begun with; name '.*run/tokenizer"
    ):
        train(settings(asked))
    own.unlink()  # the run has a copy
    copy = tmp_path / "run" / TOKENIZER
    written = copy.read_text()
    copy.write_text(train_tokenizer([b"another text"] * 3, 270))
    with pytest.raises(UserError, match=r"run/tokenizer.json' is not the one that '.*run' was begun with; put that"):
        train(settings(asked))
    copy.write_text(json.dumps(json.loads(written)))  # laid out in another way
    train(settings(asked))
    assert_equal_runs(tmp_path / "run", whole)


def test_two_processes(crew: Crew, text: Path, tokenizer: Path, tmp_path: Path) -> None:
    def of(name: str) -> dict[str, Any]:
        return values(tmp_path / name, text, tokenizer, data={"batch_bytes": 128})

    crew.run((2, train_as, of("whole")), (2, train_as, of("cut"), 6))
    crew.run((2, train_as, of("cut")))
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole")
    out = export_checkpoint(str(tmp_path / "whole"), None, str(tmp_path / "out"))
    assert (out / TOKENIZER).read_text() == tokenizer.read_text()
    assert load(out).vocabulary.size == 300


def test_summary_counts_operations_per_byte(whole: Path) -> None:
    [run] = compare_runs([whole]).runs
    summary, model = run.summary, load(whole).config.model
    assert summary.kind == "token LM"
    assert summary.mean_patch_bytes is not None
    expected = costs(model, summary.mean_patch_bytes, int(24 * summary.mean_patch_bytes))
    assert summary.training_flops_per_byte == 3 * sum(part.flops_per_byte for part in expected)
    shown = describe(InfoSettings(model=str(whole)))
    assert (shown.patch_bytes, shown.is_measured) == (summary.mean_patch_bytes, True)
    shown = describe(InfoSettings(model=str(whole), patch_bytes=2))
    assert (shown.patch_bytes, shown.is_measured) == (2, False)
    assert describe(InfoSettings(model="demo-token-lm")).patch_bytes == 4.5


def test_python_names_what_loads_it(whole: Path) -> None:
    with pytest.raises(UserError, match=r"holds a token LM, .* load it with bytelatent\.weights\.load"):
        BLT.from_pretrained(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"tokenizer": None}}, "data.tokenizer: a token LM needs one; name its tokenizer.json"),
        ({"model": {"kind": "byte_lm", **STACK}}, "data.tokenizer is for a token LM, and this model is a byte LM"),
        ({"data": {"tokenizer": "none.json"}}, "data.tokenizer: 'none.json' does not exist; train one: blt tokenizer"),
        ({"model": {**MODEL, "vocab_size": 290}}, "model.vocab_size: 290 is less than the 300 ids .*vocab_size=300"),
        ({"patching": {"mode": "space"}}, "this model is a token LM and has no patches"),
    ],
)
def test_bad_settings(text: Path, tokenizer: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(settings(values(tmp_path / "run", text, tokenizer, **changes)))
