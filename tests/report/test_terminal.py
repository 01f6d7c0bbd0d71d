import io
import re

import pytest
from rich.console import Console

from bytelatent.patching import Patch
from bytelatent.report import patched_text
from tests.report.report_texts import patched

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
