"""What the page keeps, waits for and leaves out: reloads, a server that is not there, pasted texts."""

import time
from typing import Any

from playwright.sync_api import Page, expect

from tests.serving.page.browsing import Open, patched, read


def paste(page: Page, text: str) -> None:
    page.evaluate("(text) => navigator.clipboard.writeText(text)", text)
    page.get_by_label("Text", exact=True).press("Control+a")
    page.keyboard.press("Control+v")


def test_waits_for_the_model_and_the_server(open_page: Open) -> None:
    page = open_page()
    expect(page.locator(".facts dd").first).to_be_visible()
    answers: list[Any] = ["loading"]

    def answer(route: Any) -> None:
        what = answers.pop(0) if answers else None
        if what == "loading":
            error = {"message": "the model is being loaded", "code": "model_loading"}
            route.fulfill(status=503, json={"error": error}, headers={"Retry-After": "2"})
        elif what == "gone":
            route.abort()
        else:
            route.continue_()

    page.route("**/v1/patches", answer)
    page.reload()
    expect(page.get_by_text("The model is loading …")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_role("slider")).to_have_count(0)
    expect(page.get_by_role("button", name="Reset to the model's")).to_have_count(0)
    expect(page.locator(".facts dd").first).to_be_visible()  # by itself
    expect(page.get_by_text("The model is loading …")).to_have_count(0)

    answers[:] = ["gone", "gone"]
    page.get_by_label("Text", exact=True).fill("after it was killed")
    expect(page.get_by_role("alert")).to_contain_text("by itself in 2 s")
    expect(page.locator("#view-patches .status")).to_have_text("")
    assert "–" not in page.locator(".histogram").inner_text()
    expect(page.get_by_role("alert")).to_contain_text("by itself in 4 s")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator(".facts dd").nth(3)).to_have_text("19")
    read(page, "")
    assert "–" not in page.locator(".histogram").inner_text()


def test_a_reload_keeps_texts_and_settings(open_page: Open) -> None:
    page = open_page()
    read(page, "A text of mine.")
    page.get_by_label("Threshold, over the histogram").fill("5.2")
    page.get_by_label("Bytes per patch").fill("6")
    page.get_by_label("Colour the text by mode static").check()
    expect(page.locator(".facts dd").nth(2)).to_have_text("3")
    page.reload()
    expect(page.get_by_label("Text", exact=True)).to_have_value("A text of mine.")
    expect(page.locator(".facts dd").nth(2)).to_have_text("3")
    expect(page.get_by_role("slider", name="Threshold", exact=True)).to_have_attribute("aria-valuenow", "5.20")
    expect(page.get_by_label("Bytes per patch")).to_have_value("6")

    page.get_by_role("tab", name="Generate").click()
    back = page.locator("#view-generate").get_by_role("button", name="Back to the example")
    expect(back).to_be_hidden()
    page.get_by_label("Chat", exact=True).check()
    page.get_by_label("Message", exact=True).fill("Mine")
    page.get_by_label("Seed").fill("9")
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_have_value("Mine")
    expect(page.get_by_label("Seed")).to_have_value("9")
    back.click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("She was")
    expect(page.get_by_label("Seed")).to_have_value("0")
    expect(back).to_be_hidden()


def test_pasted_texts(open_page: Open) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    expect(page.locator(".facts dd").first).to_be_visible()
    paste(page, "a\r\nb")
    expect(page.get_by_text("Carriage returns were left out")).to_be_visible()
    expect(page.locator(".facts dd").nth(3)).to_have_text("3")
    paste(page, "a\nb")
    expect(page.get_by_text("Carriage returns were left out")).to_have_count(0)
    began = time.monotonic()
    paste(page, "é and more text\n" * 75_000)
    expect(page.get_by_text("its first 262,144 bytes are read")).to_be_visible()
    page.evaluate("() => new Promise(requestAnimationFrame)")
    print(f"{time.monotonic() - began:.1f} s")
    value = page.get_by_label("Text", exact=True).input_value()
    assert len(value.encode()) in (262_143, 262_144)


def test_the_chosen_byte_is_in_sight_on_a_phone(open_page: Open) -> None:
    page = open_page(width=360, has_touch=True, is_mobile=True)
    read(page, "A line of a text.\n" * 30)
    patched(page).focus()
    for _ in range(12):
        page.keyboard.press("ArrowDown")
        shown = page.locator("#view-patches .inspected p")
        expect(shown).to_be_in_viewport(ratio=1)
        below = page.wait_for_function(  # until it is drawn where it has come to
            """() => { const about = document.querySelector(".inspected p").textContent;
              const first = Number(about.match(/byte (\\d+)/)[1]) - 1;
              const blocks = [...document.querySelectorAll("#view-patches .block")];
              const element = blocks.find((each) => first < each.block.to);
              const glyph = element.block.glyphs?.find((each) => each.from === first);
              const height = parseFloat(getComputedStyle(element).lineHeight);
              return glyph && element.getBoundingClientRect().top + (glyph.row + 1) * height; }"""
        ).json_value()
        over = page.locator("#view-patches .inspector").bounding_box()
        assert over is not None
        assert 0 < below <= over["y"] + 1  # the text itself is not covered
    expect(shown).to_contain_text("byte 217 ")  # the first is byte 1
