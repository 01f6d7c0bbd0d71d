"""Whether everyone can use the page: errors, themes, widths, screen readers, the keyboard alone."""

import re
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, expect

from tests.serving.page.browsing import Open, num_patches, patched

AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
VIEWS = ["patches", "generate", "compare"]
WIDTHS = [360, 1440]


def test_errors_name_the_way_out(open_page: Open) -> None:
    page = open_page()
    expect(page.locator(".facts dd").first).to_be_visible()
    status: list[Any] = []
    keys: list[str | None] = []

    def answer(route: Any) -> None:
        keys.append(route.request.headers.get("authorization"))
        what = status.pop(0) if status else None
        if what is None:
            route.continue_()
        elif what == "gone":
            route.abort()
        else:
            error = {"message": "prompt: 9 bytes, at most 8", "code": "context_length_exceeded"}
            route.fulfill(status=what, json={"error": error}, headers={"Retry-After": "1"})

    page.route("**/v1/patches", answer)
    text = page.get_by_label("Text", exact=True)
    alert = page.get_by_role("alert")

    status[:] = ["gone"]
    text.fill("server gone")
    expect(alert).to_contain_text("does not answer")
    alert.get_by_role("button", name="Try again").click()
    expect(alert).to_have_count(0)

    status[:] = [429]
    text.fill("busy server")
    expect(alert).to_contain_text("busy")
    expect(alert).to_have_count(0)  # it tries again by itself
    expect(page.locator(".facts dd").nth(3)).to_have_text("11")

    status[:] = [400]
    text.fill("a text that is too long")
    expect(alert).to_contain_text("at most 8")
    expect(alert).to_contain_text("shorter")

    status[:] = [401]
    text.fill("key needed")
    expect(alert).to_contain_text("needs a key")
    alert.get_by_label("API key").fill("secret <key>")
    alert.get_by_role("button", name="Use this key").click()
    expect(alert).to_have_count(0)
    expect(page.locator(".facts dd").nth(3)).to_have_text("10")
    assert keys[-1] == "Bearer secret <key>"
    stored = page.evaluate("() => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert "secret" not in stored
    page.get_by_role("tab", name="Generate").click()
    page.get_by_text("This request as a command").click()
    assert "secret" not in page.locator("body").inner_text()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_in_each_theme_and_width(open_page: Open, theme: str, width: int) -> None:
    page = open_page(width=width, theme="dark" if theme == "light" else "light")
    page.get_by_label("Theme").select_option(theme)
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == theme
    axe = AXE.read_text(encoding="utf-8")
    for view in VIEWS:
        page.get_by_role("tab", name=view.title()).click()
        if view == "patches":
            expect(page.locator(".facts dd").first).to_be_visible()
            patched(page).focus()
            page.keyboard.press("ArrowRight")
        else:
            for field in page.locator("input[name=max_tokens]:visible").all():
                field.fill("20")
            page.locator("button.primary:visible").click()
            expect(page.locator(f"#view-{view} .status").last).to_contain_text("bits per byte")
            expect(page.locator(f"#view-{view} button:has-text('Stop')")).to_be_disabled()
            patched(page).first.focus()
            page.keyboard.press("ArrowRight")
            expect(page.locator(f"#view-{view} .inspected")).to_be_visible()
        # Debugging has its own world: the page's policy forbids what axe does to load itself.
        page.evaluate(axe)
        found = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]] == []
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == theme


def test_keyboard_alone(open_page: Open) -> None:
    page = open_page(reduced_motion="reduce")
    expect(page.locator(".facts dd").first).to_be_visible()

    def focused() -> str:
        return page.evaluate(
            "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent || ''"
        )

    def tab_to(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if name in focused():
                return
        raise AssertionError(f"Tab never reached {name}")

    tab_to("Skip to the content")
    tab_to("Patches")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#view-generate")).to_be_visible()
    assert page.url.endswith("#generate")
    tab_to("Generate")
    page.keyboard.press("Enter")
    expect(page.locator("#view-generate .block").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#view-generate .status")).not_to_contain_text("…")
    page.locator("#tab-generate").focus()
    page.keyboard.press("Home")
    expect(page.locator("#view-patches")).to_be_visible()
    tab_to("English")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.get_by_label("Text", exact=True)).to_have_value(re.compile("def fibonacci"))
    tab_to("Text in patches")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#view-patches .unseen[role=status]")).to_contain_text("1 byte, patch")
    tab_to("Threshold")
    before = num_patches(page)
    page.keyboard.press("Home")
    expect(page.locator(".facts dd").nth(2)).not_to_have_text(str(before))


def test_other_files_are_not_served(address: str, browser: Browser) -> None:
    page = browser.new_page()
    found = page.request.get(f"{address}/")
    assert found.ok
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert page.request.get(f"{address}/__init__.py").status == 404
    assert page.request.get(f"{address}/%2e%2e/app.py").status == 404
    page.close()
