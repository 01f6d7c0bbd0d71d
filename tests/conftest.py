"""Shared by all tests."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: how long an example takes says more about the machine's other work than about the code.
settings.register_profile("bytelatent", deadline=None, max_examples=30)
settings.load_profile("bytelatent")

# A shell's background job is started with SIGINT ignored, what nohup starts with SIGHUP, and either hands that on to
# the programs that tests stop.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def heard_again() -> Iterator[None]:
    """A command that was stopped no longer hears SIGINT, nor would the programs that later tests start."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Tiny models and their outputs, made with the published code; see the facts in each test that reads them."""
    return Path(__file__).parent / "goldens"
