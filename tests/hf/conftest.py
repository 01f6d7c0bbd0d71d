"""BLTs inside transformers; `make test-hf` installs what these tests need, and runs them."""

import os
from pathlib import Path

import pytest
import torch

if "TEST_HF" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
    import transformers

    # With version 4, which has no PEFT and TRL of its time beside it, only what needs neither.
    if transformers.__version__.startswith("4."):
        collect_ignore_glob = ["test_training.py", "test_adapters.py", "test_docs.py", "test_chat.py"]

from bytelatent import BLT
from bytelatent.model.settings import CrossAttentionSettings, StackSettings
from bytelatent.patching import PatchSettings
from bytelatent.weights import Config
from tests.model.tiny import tiny_blt, tiny_byte_lm
from tests.weights.test_hugging_face import between, random_rows, real_entropies


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def blt() -> BLT:
    """Its entropies lie on both sides of the threshold, and transformers' own class can express it."""
    local = {"dim": 16, "num_layers": 1, "num_heads": 2, "multiple_of": 8, "window": 30}
    model = tiny_blt(
        seed=3,
        encoder=StackSettings(**local),
        global_transformer=StackSettings(dim=24, num_layers=2, num_heads=3, num_kv_heads=1, multiple_of=8),
        decoder=StackSettings(**local),
        cross_attention=CrossAttentionSettings(k=2, num_heads=2),
    )
    byte_lm = tiny_byte_lm(seed=4, window=30)
    patching = PatchSettings(threshold=between(real_entropies(byte_lm, random_rows(0))))
    return BLT(model, Config(model=model.settings, context=64, patching=patching), byte_lm)


@pytest.fixture(scope="session")
def folder(blt: BLT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in our format."""
    folder = tmp_path_factory.mktemp("native") / "model"
    blt.save_pretrained(folder)
    return folder
