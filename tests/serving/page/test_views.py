"""What the three views of the page do, in a real browser, with a real server on a tiny model."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from playwright.sync_api import Page, expect

from bytelatent.blt import BLT
from bytelatent.patching import PatchSettings, next_starts
from bytelatent.serving.patches import patches_answer
from tests.serving.page.browsing import NAMES, Open, facts, num_patches, patched, read, wait_until_read


def test_patches_are_the_servers(open_page: Open, blt: BLT) -> None:
    page = open_page()
    text = "The Byte Latent Transformer, 2024.\n\tIt reads bytes."
    page.get_by_label("Text", exact=True).press_sequentially("typed ")
    read(page, text)
    answer = patches_answer(blt, text)
    assert facts(page) == {
        "mean patch": f"{len(text) / len(answer['starts']):.2f} bytes",
        "FLOPs saved": f"{100 * answer['flops_saved']:.0f} %".replace("-", "−"),
        "patches": str(len(answer["starts"])),
        "bytes": str(len(text)),
        "characters": str(len(text)),
        "mean entropy": f"{sum(answer['entropies']) / len(text):.2f} nats",
    }
    rows = page.locator(".modes tbody tr").all()
    counts = {row.locator("th").inner_text().split()[0]: row.locator("td").first.inner_text() for row in rows}
    assert counts == {
        "entropy": str(len(answer["starts"])),
        "space": str(len(answer["modes"]["space"]["starts"])),
        "static": str(len(answer["modes"]["static:4"]["starts"])),
    }
    page.get_by_label("Bytes per patch").fill("1")
    expect(page.locator(".modes tbody tr").nth(2).locator("td").first).to_have_text(str(len(text)))
    page.get_by_label("Colour the text by mode space").check()
    expect(page.locator(".facts dd").nth(2)).to_have_text(str(len(answer["modes"]["space"]["starts"])))


def test_the_threshold_moves(open_page: Open, blt: BLT) -> None:
    page = open_page()
    text = "Where the next byte is hard to guess, a patch begins. " * 3
    read(page, text)
    bar = page.get_by_role("slider", name="Threshold", exact=True)

    def check() -> float:
        page.evaluate("async () => { for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame); }")  # drawn
        threshold = float(bar.get_attribute("aria-valuenow") or "nan")
        expect(page.locator(".facts dd").nth(2)).to_have_text(
            str(len(patches_answer(blt, text, threshold=threshold)["starts"]))
        )
        return threshold

    page.get_by_label("Threshold, over the histogram").fill("5.2")
    assert check() == 5.2
    box = bar.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 20, box["y"] + 12)
    page.mouse.down()
    page.mouse.move(box["x"] + 30, box["y"] + 20, steps=4)
    page.mouse.up()
    dragged = check()
    assert dragged < 5.1
    # The line itself can be dragged, too.
    line = bar.bounding_box()
    assert line is not None
    page.mouse.move(line["x"] + 300, line["y"] + line["height"] / 2)
    page.mouse.down()
    page.mouse.move(line["x"] + 300, line["y"] + line["height"] / 2 - 5)
    page.mouse.up()
    assert check() > dragged
    bar.press("Home")
    assert check() == 0
    bar.press("ArrowUp")
    assert check() == 0.05
    bar.press("End")
    assert check() >= 5
    assert num_patches(page) == 1
    page.get_by_role("button", name="Reset to the model's").click()
    expect(page.locator(".facts dd").nth(2)).to_have_text(str(len(patches_answer(blt, text)["starts"])))


def test_starts_equal_the_models(open_page: Open) -> None:
    generator = torch.Generator().manual_seed(0)
    entropies = torch.rand(200, generator=generator) * 4
    entropies[5::11] = 1.3  # exactly at the threshold in float32, which is below it in float64
    entropies[3::7] = entropies[2:-1:7]  # no rise
    kinds: list[dict[str, Any]] = [
        {},
        {"monotonicity": True},
        {"threshold_add": 0.4},
        {"max_patch_length": 5},
        {"threshold_add": -1.0, "max_patch_length": 3},
    ]
    cases = [PatchSettings(threshold=threshold, **kind) for threshold in (0.0, 1.3, 2.71, 9.0) for kind in kinds]
    cases += [PatchSettings(mode="static", patch_size=size) for size in (1, 2, 4, 7)]
    wanted = []
    for settings in cases:
        starts = next_starts(torch.full((200,), 100), entropies, torch.arange(200), settings)
        starts[0] = True
        wanted.append(starts.int().tolist())
    asked = [{**settings.plain(), "decision": settings.decision} for settings in cases]
    found = open_page().evaluate(
        """async ([values, cases]) => {
          const { entropyStarts, staticStarts } = await import("/starts.js");
          const entropies = Float32Array.from(values);
          return cases.map((its) => Array.from(its.mode === "static"
            ? staticStarts(entropies.length, its.patch_size) : entropyStarts(entropies, its, its.threshold)));
        }""",
        [[float(f"{value:.9g}") for value in entropies.tolist()], asked],
    )
    for settings, ours, theirs in zip(cases, wanted, found, strict=True):
        assert theirs == ours, settings.in_words()
    assert len({tuple(starts) for starts in wanted}) > 12


SCRIPTS = {
    "right to left": "שלום עולם, مرحبا بالعالم",
    "combining": "e\u0301 a\u0308\u0323 क्षि ก็",
    "emoji": "👩‍🔬 👨‍👩‍👧‍👦 🇯🇵 👍🏽",
    "markup": "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;",
    "unseen": "a\u200bb\u202ec\u0000d\u007f\u2028e\ufeff\u00a0f\u3000",
    "half": "a\ud83db",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_text(open_page: Open, blt: BLT, name: str) -> None:
    page = open_page()
    text = SCRIPTS[name]
    page.evaluate(
        """text => { const field = document.querySelector("#view-patches textarea");
          field.value = text; field.dispatchEvent(new Event("input")); }""",
        text,
    )
    data = text.encode("utf-8", "replace" if name == "half" else "strict").replace(b"?", "\ufffd".encode())
    expect(page.locator(".facts dd").nth(3)).to_have_text(str(len(data)))
    expect(page.locator(".facts dd").nth(2)).to_have_text(str(len(patches_answer(blt, data)["starts"])))
    if name not in ("unseen", "half"):
        assert patched(page).locator(".block").inner_text() == text
    # The arrow keys visit every character once, and all bytes with it.
    patched(page).focus()
    sizes, seen = [], None
    page.keyboard.press("Home")
    while (at := page.locator(".inspected p").inner_text()) != seen:
        sizes.append(page.locator(".inspector tbody:visible tr").count())
        seen = at
        page.keyboard.press("ArrowRight")
    assert sum(sizes) == len(data)
    if name == "emoji":
        assert sizes == [11, 1, 25, 1, 8, 1, 8]
    if name == "unseen":
        assert patched(page).locator(".block").inner_text() == "a◦b◦c␀d␡◦e◦␣f␣"
    if name == "combining":
        assert sizes[:3] == [3, 1, 5]


def test_patches_lie_where_the_characters_are(open_page: Open, blt: BLT) -> None:
    """Of a right-to-left text the first patch is at the right."""
    page = open_page()
    read(page, "שלום")
    patched(page).focus()
    page.keyboard.press("Home")
    boxes = page.evaluate(
        """() => { const { block } = document.querySelector("#view-patches .block");
          return block.glyphs.map((glyph) => [glyph.begin, glyph.end, glyph.from, glyph.to]); }"""
    )
    begins = [begin for begin, *_ in boxes]
    assert begins == sorted(begins, reverse=True)
    assert all(begin > end for begin, end, *_ in boxes)
    assert [piece for *_, start, end in boxes for piece in (start, end)] == [0, 2, 2, 4, 4, 6, 6, 8]


def test_bytes_on_hover(open_page: Open) -> None:
    page = open_page()
    read(page, "aé")
    box = patched(page).locator(".block > span").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + box["height"] / 2)
    rows = page.locator("#view-patches .inspector tbody tr")
    expect(rows).to_have_count(2)
    assert [row.locator("th").inner_text() for row in rows.all()] == ["C3", "A9"]


def test_long_text(open_page: Open) -> None:
    """Only blocks in sight are drawn; the end is reached by scrolling."""
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    line = "Each line of a long text has words, 数字 and signs: 12345.\n"
    text = line * (200_000 // len(line.encode()))
    page.evaluate("(text) => navigator.clipboard.writeText(text)", text)
    page.get_by_label("Text", exact=True).press("Control+a")
    page.keyboard.press("Control+v")
    wait_until_read(page, text)
    blocks = page.locator("#view-patches .block")
    assert blocks.count() > 100
    assert page.locator("#view-patches canvas").count() < 12
    expect(blocks.last.locator("canvas")).to_have_count(0)
    # Again and again, as blocks that come into sight may be higher than expected.
    page.wait_for_function(
        """host => {
            host.scrollTo(0, host.scrollHeight);
            const canvas = [...host.querySelectorAll(".block")].at(-1).querySelector("canvas");
            const drawn = canvas?.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return drawn?.some((value) => value) ?? false;
        }""",
        arg=patched(page).element_handle(),
    )
    assert page.locator("#view-patches canvas").count() < 12
    # A change at the end asks only for the last piece.
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.get_by_label("Text", exact=True).press("Control+End")
    page.keyboard.type("more")
    wait_until_read(page, text + "more")
    assert 1 <= len(asked) <= 8  # at most one for each key, and one for a piece that became too long


def generated(page: Page) -> str:
    return "".join(patched(page).last.locator(".block").all_inner_texts()).replace("↵", "")


def test_generate(open_page: Open, blt: BLT) -> None:
    page = open_page("generate")
    view = page.locator("#view-generate")
    page.get_by_label("Prompt").fill("The history of")
    page.get_by_label("Bytes", exact=True).fill("40")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Temperature").fill("0.6")
    page.get_by_role("button", name="Generate").click()
    status = view.locator(".status")
    expect(status).to_contain_text("bits per byte")
    wanted = blt.generate("The history of", 40, seed=7, temperature=0.6, top_p=0.95, return_log_probabilities=True)
    found = page.evaluate("() => document.querySelector('#view-generate .block').block")
    assert found["to"] == int((wanted.ids >= 4).sum())
    bits = -float(wanted.log_probabilities[wanted.ids >= 4].double().mean()) / 0.6931471805599453
    expect(status).to_contain_text(f"{bits:.2f} bits per byte")
    patched(page).focus()
    page.keyboard.press("Home")
    inspector = view.locator(".inspector")
    p = float(wanted.log_probabilities[0].exp())
    expect(inspector.locator("tbody td").first).to_have_text(f"{100 * p:.1f} %")
    assert inspector.locator(".likeliest").first.locator("li").count() >= 5


def test_stop_keeps_what_came(open_page: Open) -> None:
    page = open_page("generate")
    page.get_by_label("Bytes", exact=True).fill("16384")
    page.get_by_label("Temperature").fill("1")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#view-generate .block").first).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#view-generate .status")).to_contain_text("Stopped. ")
    assert page.get_by_role("button", name="Stop").is_disabled()
    assert patched(page).locator(".block").count() >= 1


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_commands_give_the_same_text(open_page: Open, kind: str) -> None:
    page = open_page("generate")
    if kind == "chat":
        page.get_by_label("Chat", exact=True).check()
    prompt = 'It\'s "quoted" $HOME\n\\n é 🇯🇵'
    page.get_by_label("Message" if kind == "chat" else "Prompt", exact=True).fill(prompt)
    page.get_by_label("Bytes", exact=True).fill("30")
    page.get_by_label("Stop texts").fill("\\n\\n|zzz")
    page.get_by_text("This request as a command").click()
    curl, python = page.locator(".command pre").all_text_contents()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#view-generate .status")).to_contain_text("bits per byte")
    shown = page.locator("#view-generate .block").text_content() or ""
    streamed = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True, timeout=60).stdout
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    by_curl = "".join(choice["delta"].get("content") or "" if kind == "chat" else choice["text"] for choice in choices)
    utf8 = {**os.environ, "PYTHONUTF8": "1"}
    ran = subprocess.run([sys.executable, "-c", python], capture_output=True, check=True, timeout=60, env=utf8)
    assert ran.stdout.decode() == by_curl
    assert len(by_curl) > 5
    # Bytes that are no UTF-8 are shown one by one in the page, and signs take the place of controls.
    letters = re.compile(
        "[^\ufffd\u2400-\u2423\u25e6↵⇥\\s\x00-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]"
    )
    assert letters.findall(shown) == letters.findall(by_curl)


def test_chat_remembers(open_page: Open) -> None:
    page = open_page("generate")
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    page.get_by_label("Chat", exact=True).check()
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Bytes", exact=True).fill("12")
    for number, message in enumerate(("Hello", "And now?"), start=1):
        page.get_by_label("Message", exact=True).fill(message)
        page.keyboard.press("Control+Enter")
        expect(page.locator("#view-generate .generation")).to_have_count(number)
        expect(page.locator("#view-generate .status").last).to_contain_text("bits per byte")
    assert [message["role"] for message in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#view-generate .generation")).to_have_count(0)


def test_compare(open_page: Open) -> None:
    page = open_page("compare")
    for side in ("Left", "Right"):
        fields = page.get_by_role("group", name=side)
        fields.get_by_label("Bytes").fill("30")
        fields.get_by_label("Temperature").fill("0.7")
    page.get_by_role("group", name="Right").get_by_label("Model").select_option(NAMES[1])
    page.get_by_role("button", name="Compare").click()
    summary = page.locator(".summary")
    expect(summary).to_contain_text("Bits per byte: left")
    texts = [each.inner_text() for each in patched(page).all()]
    assert texts[0] == texts[1]  # two names of one model
    page.get_by_role("group", name="Right").get_by_label("Seed").fill("1")
    page.get_by_role("button", name="Compare").click()
    expect(summary).to_contain_text("Bits per byte: left")
    texts = [each.inner_text() for each in patched(page).all()]
    assert texts[0] != texts[1]
    patched(page).last.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#view-compare .inspected")).to_be_visible()
