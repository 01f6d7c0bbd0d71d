from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bytelatent.training import train
from tests.training.crew import Crew
from tests.training.tiny_runs import byte_lm_run, settings, write_text


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the order in which the subprocesses of these tests take them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def crew() -> Iterator[Crew]:
    """Four processes, for jobs of so many ranks at the most."""
    crew = Crew(4)
    yield crew
    crew.close()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of documents of about 100 bytes."""
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", seed=0)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A run that nothing happened to; tests only read it."""
    return train(settings(byte_lm_run(tmp_path_factory.mktemp("whole") / "run", text)))


@pytest.fixture(scope="session")
def byte_lm(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The run of a byte LM, for patching by entropy."""
    return train(settings(byte_lm_run(tmp_path_factory.mktemp("byte_lm") / "run", text, steps=12)))
