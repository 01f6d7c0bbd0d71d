"""The characters of patches, and patched texts in the terminal."""

import io
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bytelatent.patching import Patch
from bytelatent.report import patched_text
from bytelatent.report.text import LOST, amount_of_flops, characters, finite, visible
from tests.report.report_texts import patched


@given(st.binary(max_size=40), st.lists(st.integers(0, 40)))
def test_every_byte_belongs_to_exactly_one_character(data: bytes, cuts: list[int]) -> None:
    entropies = [float(i) for i in range(len(data))]
    found = [
        c for patch in patched(data, [cut for cut in cuts if cut < len(data)], entropies) for c in characters(patch)
    ]
    offsets = [offset for c in found for offset in range(c.start, c.start + c.num_bytes)]
    assert offsets == list(range(len(data)))
    assert [entropy for c in found for entropy in c.entropies or ()] == entropies


@given(st.text(max_size=20).filter(lambda text: LOST not in text), st.lists(st.integers(0, 60)))
def test_known_bytes_are_those_of_the_text_wherever_it_is_cut(text: str, cuts: list[int]) -> None:
    data = text.encode()
    for patch in patched(data, [cut for cut in cuts if cut < len(data)]):
        for c in characters(patch):
            if c.values is None:
                assert c.text == LOST
            else:
                assert data[c.start : c.start + c.num_bytes] == c.values == c.text.encode()
    whole = len([c for patch in patched(data, []) for c in characters(patch) if c.values is not None])
    assert whole == len(text)


def test_a_cut_emoji_is_one_mark_a_byte() -> None:
    left, right = patched("a😀b".encode(), [3])
    assert [(c.start, c.text) for c in characters(left)] == [(0, "a"), (1, LOST), (2, LOST)]
    assert [(c.start, c.text) for c in characters(right)] == [(3, LOST), (4, LOST), (5, "b")]


@given(st.characters(codec="utf-8"))
def test_what_is_shown_can_neither_hide_nor_steer(character: str) -> None:
    shown = visible(character)
    assert shown
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp") for c in shown)


@pytest.mark.parametrize(
    ("character", "shown"),
    [("\n", "↵"), ("\t", "⇥"), ("\x1b", "␛"), ("\x7f", "␡"), ("\u202e", "<U+202E>"), ("\u0301", "◌\u0301"), ("é", "é")],
)
def test_names_of_the_invisible(character: str, shown: str) -> None:
    assert visible(character) == shown


def test_finite() -> None:
    assert finite("2.5") == 2.5
    assert [finite(value) for value in (None, "x", float("nan"), float("inf"), {})] == [None] * 5


ESCAPE = re.compile(r"\x1b\[([\d;]*)m")


def printed(patches: list[Patch], *, name: str = "entropy", bars: bool = False, width: int = 80, **console) -> str:
    out = console.pop("file", io.StringIO())
    Console(file=out, width=width, **console).print(patched_text(name, patches, show_entropies=bars))
    if isinstance(out, io.TextIOWrapper):
        out.flush()
        return out.buffer.getvalue().decode(out.encoding)  # pyright: ignore[reportAttributeAccessIssue]
    return out.getvalue()


def body(output: str) -> str:
    return output.split("\n", 1)[1]


def test_piped_patches_are_separated() -> None:
    assert body(printed(patched(b"one two three", [4, 8]))) == "one │two │three\n"


def test_no_color_keeps_the_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    output = printed(patched(b"one two", [4]), force_terminal=True)
    assert body(output) == "one │two\n"


def test_a_mark_in_the_text_differs_from_a_boundary() -> None:
    assert body(printed(patched("a│b".encode(), [1]))) == "a│<U+2502>b\n"


@pytest.mark.parametrize("color_system", ["standard", "256", "truecolor"])
def test_neighbours_differ_in_colour_and_there_are_no_marks(monkeypatch: pytest.MonkeyPatch, color_system: str) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    output = body(printed(patched(b"one two three", [4, 8]), force_terminal=True, color_system=color_system))
    assert ESCAPE.sub("", output) == "one two three\n"
    colours = [codes for codes in ESCAPE.findall(output) if codes != "0"]
    assert len(colours) == 3
    assert colours[0] == colours[2] != colours[1]


def test_header_counts() -> None:
    assert printed(patched("é two".encode(), [3])).splitlines()[0] == (
        "entropy: 2 patches over 6 bytes, 3.00 bytes per patch on average"
    )
    assert printed([]).strip() == "entropy: 0 patches"


def test_markup_and_control_codes_are_text() -> None:
    output = printed(patched(b"[bold]x[/bold]\x1b[31m\x07\r\t", []), name="[red]r[/red]\x1b[2J")
    assert output.startswith("[red]r[/red]␛[2J: ")
    assert body(output) == "[bold]x[/bold]␛[31m␇␍⇥\n"


def test_a_line_feed_is_seen_and_breaks_the_line() -> None:
    assert body(printed(patched(b"a\nb", [2]))) == "a↵\n│b\n"


def test_invalid_and_cut_utf8() -> None:
    data = "é".encode()
    assert body(printed(patched(data, [1]))) == "�│�\n"
    assert body(printed(patched(b"\xff\xfea", []))) == "��a\n"


def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost() -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(500))
    lines = body(printed(patched(text.encode(), range(0, 500, 7)), width=40)).splitlines()
    assert max(map(len, lines)) == 40
    assert "".join(lines) == "│".join(text[i : i + 7] for i in range(0, 500, 7))


def test_entropies_are_a_block_a_byte() -> None:
    lines = body(printed(patched("aé b".encode(), [3], [0.0, 4.0, 2.0, 1.0, float("nan")]), bars=True)).splitlines()
    assert lines[0] == "entropy of each byte: ▁ is 0, █ is 4.00 nats"
    assert lines[1:] == ["aé │ b", "▁█▅│▃"]


def test_entropies_that_do_not_exist() -> None:
    assert body(printed(patched(b"ab", [1]), bars=True)) == "a│b\n"


def test_ascii_terminals_get_ascii() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    output = printed(patched("é|x".encode(), [2], [0.0, 1.0, 2.0, 0.0]), bars=True, file=out)
    assert output.splitlines()[2] == r"\xe9|<U+007C>x"
    assert output.isascii()


@pytest.mark.parametrize(
    ("flops", "words"),
    [(1e16, "10¹⁶"), (3.16e16, "3.2×10¹⁶"), (2.0, "2×10⁰"), (5.5e-3, "5.5×10⁻³"), (float("nan"), "–")],
)
def test_amounts_of_flops(flops: float, words: str) -> None:
    assert amount_of_flops(flops) == words
