"""A hub on this machine with one model, and an empty cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bytelatent.hub import cache, repository
from tests.hub.model_folders import MODEL, NAME, OTHERS, write
from tests.hub_server import HubServer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(NAME, write(tmp_path / "repository", MODEL | OTHERS), kind="model")
        server.connect(monkeypatch, tmp_path)
        monkeypatch.setattr(repository, "FIRST_PAUSE", 0.01)
        monkeypatch.setattr(cache, "POLL", 0.02)
        yield server


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
