"""A hub on this machine, and models that every format has room for."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bytelatent import BLT
from bytelatent.model import BLTModel
from bytelatent.model.settings import CrossAttentionSettings
from bytelatent.patching import PatchSettings
from bytelatent.weights import Config
from tests.hub_server import HubServer
from tests.model.tiny import tiny_blt, tiny_byte_lm


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def blt() -> BLT:
    model: BLTModel = tiny_blt(seed=3, window=6, cross_attention=CrossAttentionSettings(k=2, num_heads=2))
    config = Config(model=model.settings, context=64, patching=PatchSettings(threshold=5.12))
    return BLT(model, config, tiny_byte_lm(seed=4, window=6))
