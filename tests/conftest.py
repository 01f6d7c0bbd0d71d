"""Shared by all tests."""

from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: how long an example takes says more about the machine's other work than about the code.
settings.register_profile("bytelatent", deadline=None, max_examples=30)
settings.load_profile("bytelatent")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Tiny models and their outputs, made with the published code; see the facts in each test that reads them."""
    return Path(__file__).parent / "goldens"
