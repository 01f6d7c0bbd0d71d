"""Take screenshots of the page for the docs: docs/images/page_*.png.

    blt serve tiny --port 8000
    python dev/page_screenshots.py http://127.0.0.1:8000

Needs playwright and Chromium (`make test-serve` installs the first, Debian's `apt-get install chromium` the second),
and the Liberation and DejaVu fonts.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="of a server")
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--browser", default=shutil.which("chromium"))
    given = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.browser, args=["--no-sandbox"])
        for name, view, theme, size in [
            ("page_patches", "patches", "light", (1200, 800)),
            ("page_generate", "generate", "dark", (1200, 760)),
            ("page_compare", "compare", "light", (1200, 800)),
            ("page_narrow", "patches", "dark", (360, 740)),
        ]:
            page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=theme)  # pyright: ignore[reportArgumentType]
            page.set_default_timeout(60_000)
            page.goto(f"{given.address}/#{view}")
            SHOW[view](page)
            page.wait_for_timeout(500)  # the canvas follows the text by a frame
            page.screenshot(path=given.out / f"{name}.png", full_page=view != "patches" or size[0] > 400)
            print(given.out / f"{name}.png")
        browser.close()


def show_patches(page: Page) -> None:
    page.get_by_role("button", name="English").click()
    expect(page.locator(".facts dd").first).to_be_visible()
    click_at(page, "#view-patches .patched")


def show_generate(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#view-generate .status")).to_contain_text("bits per byte", timeout=120_000)
    page.locator("#view-generate .patched").evaluate("(host) => host.scrollTo(0, 0)")
    click_at(page, "#view-generate .patched")


def show_compare(page: Page) -> None:
    for field in page.locator("input[name=max_tokens]:visible").all():
        field.fill("120")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".summary")).to_contain_text("Bits per byte", timeout=120_000)


def click_at(page: Page, selector: str) -> None:
    page.locator(selector).first.scroll_into_view_if_needed()
    box: Any = page.locator(selector).first.bounding_box()
    page.mouse.click(box["x"] + 90, box["y"] + 70)


SHOW = {"patches": show_patches, "generate": show_generate, "compare": show_compare}

if __name__ == "__main__":
    main()
