"""A browser, a server on a tiny model, and the page in one of the other."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bytelatent.blt import BLT
from tests.serving.conftest import Served
from tests.serving.page.browsing import CHROMIUM, NAMES, Open, tiny_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

if "TEST_SERVE" not in os.environ:
    collect_ignore_glob = ["test_*.py"]

STATUS_OF_ERRORS = re.compile(r"Failed to load resource.*(status of|ERR_FAILED)")  # the browser's own, of asked errors


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page") / "model"


@pytest.fixture(scope="session")
def blt(folder: Path) -> BLT:
    return tiny_model(folder)


@pytest.fixture(scope="session")
def address(blt: BLT, folder: Path) -> Iterator[str]:
    server = Served(folder, "--name", NAMES[1])
    yield server.address
    server.stop()


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    if not CHROMIUM.exists() and "CI" not in os.environ:
        pytest.skip(f"there is no {CHROMIUM}; install it: apt-get install chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser: "Browser", address: str) -> Iterator[Open]:
    """Opens a view; at the end nothing may have gone wrong in it, nor been asked of another host."""
    from playwright.sync_api import expect

    problems: list[str] = []
    contexts = []

    def opened(view: str = "patches", width: int = 1440, theme: Any = "light", **options: Any) -> "Page":
        contexts.append(
            context := browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **options)
        )
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(address) else problems.append(request.url))
        page.goto(f"{address}/#{view}")
        expect(page.locator(f"#view-{view} h2")).to_be_visible()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [line for line in problems if not STATUS_OF_ERRORS.search(line)] == []
