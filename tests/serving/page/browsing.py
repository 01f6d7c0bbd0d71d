"""A server on a tiny model, and a real browser that opens its page."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bytelatent.blt import BLT
from bytelatent.patching import PatchSettings
from tests.model.tiny import tiny_blt
from tests.test_blt import wrap

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

Open = Callable[..., Any]  # opens a view
CHROMIUM = Path("/usr/bin/chromium")
NAMES = ["tiny-test", "two"]  # of the same model


def tiny_model(folder: Path) -> BLT:
    """A model whose patches have about three bytes."""
    blt = wrap(tiny_blt(window=6))
    text = "The quick brown fox jumps over the lazy dog. " * 4
    entropies = blt.read(text).entropies
    assert entropies is not None
    blt.patching = PatchSettings(mode="entropy", threshold=float(torch.quantile(entropies, 0.66)))
    blt.save_pretrained(folder)
    return BLT.from_pretrained(folder, device="cpu")


def patched(page: "Page") -> "Locator":
    return page.locator(".patched:visible")


def facts(page: "Page") -> dict[str, str]:
    names, values = page.locator(".facts dt").all_inner_texts(), page.locator(".facts dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


def read(page: "Page", text: str) -> None:
    """Put a text in, and wait until all of it has been read."""
    page.get_by_label("Text", exact=True).fill(text)
    wait_until_read(page, text)


def wait_until_read(page: "Page", text: str) -> None:
    page.wait_for_function(
        "bytes => [...document.querySelectorAll('.facts div')].some((fact) => "
        "fact.textContent.startsWith('bytes') && fact.querySelector('dd').textContent.replaceAll(',', '') === bytes)"
        " && document.querySelector('#view-patches .status').textContent === ''",
        arg=str(len(text.encode("utf-8"))),
        timeout=60_000,
    )


def num_patches(page: "Page") -> int:
    return int(facts(page)["patches"].replace(",", ""))
