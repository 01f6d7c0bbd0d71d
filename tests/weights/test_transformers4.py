"""What we write gives the same logits in transformers 4.57 and 5.

4.57 is installed apart from the environment of the tests: `make test-transformers4` does so and names the folder in
TRANSFORMERS4.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BltForCausalLM

from bytelatent import BLT
from bytelatent.model.settings import CrossAttentionSettings, NgramHashSettings, StackSettings
from bytelatent.patching import PatchSettings
from bytelatent.weights import Config
from tests.model.tiny import tiny_blt, tiny_byte_lm
from tests.weights.test_hugging_face import TOLERANCE, between, random_rows, real_entropies, their_logits

ASIDE = os.environ.get("TRANSFORMERS4")
WINDOW = 30  # longer than any row here: transformers 4.57 has no window
pytestmark = pytest.mark.skipif(ASIDE is None, reason="transformers 4.57 is not installed: make test-transformers4")


def export(folder: Path, thetas: tuple[float, float, float, float], rows: Tensor, **changes: Any) -> BLT:
    """A small model whose parts have thetas of their own: encoder, global, decoder, byte LM."""
    local = {"dim": 16, "num_layers": 1, "num_heads": 2, "multiple_of": 8, "window": WINDOW}
    middle = StackSettings(dim=24, num_layers=2, num_heads=3, num_kv_heads=1, multiple_of=8, rope_theta=thetas[1])
    values: dict[str, Any] = {
        "encoder": StackSettings(**local, rope_theta=thetas[0]),
        "global_transformer": middle,
        "decoder": StackSettings(**local, rope_theta=thetas[2]),
        "cross_attention": CrossAttentionSettings(k=2, num_heads=2),
    }
    model = tiny_blt(seed=3, **values | changes)
    byte_lm = tiny_byte_lm(seed=4, window=WINDOW, rope_theta=thetas[3])
    patching = PatchSettings(threshold=between(real_entropies(byte_lm, rows)))
    blt = BLT(model, Config(model=model.settings, context=64, patching=patching), byte_lm)
    blt.save_pretrained(folder, format="hf")
    return blt


def run(folder: Path, rows: Tensor) -> None:
    """Let transformers 4.57 read every model below a folder."""
    assert ASIDE is not None
    save_file({"rows": rows.clamp(min=0), "mask": (rows >= 0).long()}, folder / "inputs.safetensors")
    script = Path(__file__).with_name("in_transformers4.py")
    environment = {**os.environ, "PYTHONPATH": ASIDE, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, script, folder], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return random_rows(0)


@pytest.fixture(scope="module")
def exports(rows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, BLT]]:
    folder = tmp_path_factory.mktemp("exports")
    models = {
        "one_theta": export(folder / "one_theta", (500_000.0, 500_000.0, 500_000.0, 500_000.0), rows),
        "own_thetas": export(folder / "own_thetas", (100.0, 1_000.0, 10_000.0, 100_000.0), rows),
        "no_ngrams": export(folder / "no_ngrams", (1e4, 1e4, 1e4, 7.0), rows, ngram_hash=None),
        "two_tables": export(
            folder / "two_tables",
            (50.0, 5e5, 5e5, 1e4),
            rows,
            ngram_hash=NgramHashSettings(sizes=[2, 5], num_functions=2, vocab_size=53, stop_at_document=False),
        ),
    }
    run(folder, rows)
    return folder, models


@pytest.mark.parametrize("name", ["one_theta", "own_thetas", "no_ngrams", "two_tables"])
def test_the_same_logits_in_both_versions(name: str, exports: tuple[Path, dict[str, BLT]], rows: Tensor) -> None:
    folder, models = exports
    ours = models[name].logits(rows)
    in_5 = their_logits(BltForCausalLM.from_pretrained(folder / name), rows)
    outputs = load_file(folder / name / "outputs.safetensors")
    in_4 = outputs["logits"].masked_fill((rows < 0).unsqueeze(-1), 0.0)
    torch.testing.assert_close(in_5, ours, **TOLERANCE)
    torch.testing.assert_close(in_4, ours, **TOLERANCE)
    assert outputs["prompt"].tolist() == [[1, *(byte + 4 for byte in "a\u00e9<s>".encode())]]
    ids = rows[:1, :4]
    for chosen in outputs["generated"][0, 4:].tolist():
        assert chosen == int(models[name].logits(ids)[0, -1].argmax())
        ids = torch.cat([ids, torch.tensor([[chosen]])], dim=1)


@pytest.mark.parametrize("name", ["own_thetas", "no_ngrams"])
def test_what_it_saves_is_read_here(name: str, exports: tuple[Path, dict[str, BLT]], rows: Tensor) -> None:
    folder, models = exports
    again = BLT.from_pretrained(folder / name / "saved", device="cpu")
    torch.testing.assert_close(again.logits(rows), models[name].logits(rows), **TOLERANCE)


def test_it_has_no_window(tmp_path: Path) -> None:
    """Texts longer than the window differ there, in the local models and in the patcher."""
    long = random_rows(1, sizes=(2 * WINDOW,))
    ours = export(tmp_path / "a", (1e4, 1e4, 1e4, 1e4), long)
    run(tmp_path, long)
    in_4 = load_file(tmp_path / "a" / "outputs.safetensors")["logits"]
    in_5 = their_logits(BltForCausalLM.from_pretrained(tmp_path / "a"), long)
    torch.testing.assert_close(in_5, ours.logits(long), **TOLERANCE)
    assert (in_4 - in_5).abs().max() > 1e-2
