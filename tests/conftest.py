"""Shared by all tests."""

import atexit
import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# What a user's shell, a job of a cluster or an earlier program left in the environment says nothing here: before
# anything is imported that reads it.
OF_OTHERS = ("SLURM_", "SBATCH_", "HF_", "HUGGING", "WANDB_", "TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_", "LOCAL_")
NAMES_OF_OTHERS = {
    *("RANK", "WORLD_SIZE", "DUMP_DIR", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE"),
    *("TTY_COMPATIBLE", "TTY_INTERACTIVE", "TRITON_INTERPRET"),
}
for name in list(os.environ):
    if name in NAMES_OF_OTHERS or name.startswith(OF_OTHERS):
        del os.environ[name]
# Else every process that a test starts compiles all of the package, and each of pytest's all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Keys and downloads of the user, too, are none of the tests'.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="bytelatent-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# No deadline: how long an example takes says more about the machine's other work than about the code.
settings.register_profile("bytelatent", deadline=None, max_examples=30)
settings.load_profile("bytelatent")

# A shell's background job is started with SIGINT ignored, what nohup starts with SIGHUP, and either hands that on to
# the programs that tests stop.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


gc.disable()  # until all tests are imported: nothing of them is garbage


def pytest_collection_finish() -> None:
    """What was imported by now stays; the garbage collector need not look through it in every test."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Tests see messages of INFO and above in `caplog`; what a test's command configured ends with the test."""
    logger = logging.getLogger("bytelatent")
    logger.setLevel(logging.INFO)
    if documents := sys.modules.get("bytelatent.text.documents"):
        documents.forget_logged()
    yield
    logger.handlers.clear()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Gives the messages of this package since its last call, one per line."""

    def lines() -> str:
        text = "".join(f"{record.getMessage()}\n" for record in caplog.records if record.name.startswith("bytelatent"))
        caplog.clear()
        return text

    return lines


@pytest.fixture(autouse=True)
def heard_again() -> Iterator[None]:
    """A command that was stopped no longer hears SIGINT, nor would the programs that later tests start."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures of many tests do not run in the clone, whose `runs/` is the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield


@pytest.fixture(autouse=True)
def in_its_own_folder(elsewhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path in a test is below its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Tiny models and their outputs, made with the published code; see the facts in each test that reads them."""
    return Path(__file__).parent / "goldens"
