"""Shared by all tests."""

import signal
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: how long an example takes says more about the machine's other work than about the code.
settings.register_profile("bytelatent", deadline=None, max_examples=30)
settings.load_profile("bytelatent")

# A shell's background job is started with SIGINT ignored, and hands that on to the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Tiny models and their outputs, made with the published code; see the facts in each test that reads them."""
    return Path(__file__).parent / "goldens"
