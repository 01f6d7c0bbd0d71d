"""Figures and notebook views."""

from collections import Counter
from html.parser import HTMLParser

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings
from bytelatent.report.notebook import MOST_BYTES
from bytelatent.report.text import LOST
from tests.model.tiny import tiny_blt
from tests.test_blt import THRESHOLD, wrap

TEXT = "It is <b>so</b> $x$\né\n"


@pytest.fixture(scope="module")
def blt() -> BLT:
    return wrap(tiny_blt(window=6))


@pytest.fixture(autouse=True)
def _closed_figures() -> None:
    pyplot.switch_backend("agg")
    pyplot.close("all")


class Seen(HTMLParser):
    """The text of each patch, and the tooltips."""

    def __init__(self, page: str):
        super().__init__()
        self.patches: list[str] = []
        self.facts: list[str] = []
        self.is_inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "b":
            self.patches.append("")
            self.is_inside = True
        self.facts += [value or "" for name, value in attrs if name == "title"]

    def handle_endtag(self, tag: str) -> None:
        self.is_inside = self.is_inside and tag != "b"

    def handle_data(self, data: str) -> None:
        if self.is_inside:
            self.patches[-1] += data


def test_entropies(blt: BLT, caplog: pytest.LogCaptureFixture) -> None:
    axes = blt.plot_entropies(TEXT)
    patches = blt.patch(TEXT)
    heights = sorted(bar.get_height() for bar in axes.patches)
    assert heights == pytest.approx(sorted(entropy for patch in patches for entropy in patch.entropies or ()))
    lines = [line for line in axes.lines if line.get_ydata()[0] == pytest.approx(THRESHOLD)]
    assert len(lines) == 1
    assert axes.figure in map(pyplot.figure, pyplot.get_fignums())
    own = Figure().subplots()
    assert blt.plot_entropies(TEXT, ax=own, context=7) is own
    assert len(own.patches) == len(TEXT.encode())
    long = blt.plot_entropies("é" * 200)
    assert len(long.patches) == MOST_BYTES
    assert caplog.messages == ["the figure shows the first 256 bytes of 400; blt plot entropies draws more"]


def test_patch_lengths(blt: BLT) -> None:
    axes = blt.plot_patches([TEXT, "and more"])
    lengths = Counter(p.end - p.start for text in (TEXT, "and more") for p in blt.patch(text))
    shares = [100 * lengths[x] / sum(lengths.values()) for x in range(1, max(lengths) + 1)]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(shares)
    assert blt.plot_patches(TEXT, ax=axes) is axes


def test_what_cannot_be_drawn_is_named(blt: BLT) -> None:
    spaces = wrap(tiny_blt(), PatchSettings(mode="space"), with_byte_lm=False)
    for call, message in (
        (lambda: blt.plot_entropies(""), "^plot_entropies: the text is empty"),
        (lambda: blt.plot_patches([]), "^plot_patches: there is no text"),
        (lambda: spaces.plot_entropies("a b"), "^plot_entropies: the model has patches by space, without entropies"),
        (lambda: blt.plot_patches("a", ax=5), "^ax: it takes matplotlib's axes, not int"),  # type: ignore
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert len(spaces.plot_patches("a b").patches) == 2


def test_patches_in_a_notebook(blt: BLT) -> None:
    patches = blt.patch(TEXT)
    assert patches == list(patches)
    page = patches._repr_html_()
    seen = Seen(page)
    assert len(seen.patches) == len(patches)
    for shown, patch in zip(seen.patches, patches, strict=True):
        assert LOST in patch.text or shown == patch.text.replace("\n", "↵\n")
    assert not all(LOST in patch.text for patch in patches)
    assert sum(fact.count("\nbyte ") for fact in seen.facts) == len(TEXT.encode())
    first = (patches[0].entropies or [0.0])[0]
    assert f"entropy {first:.2f} nats" in seen.facts[0]
    assert "<b>so" not in page
    assert f"threshold {THRESHOLD:.2f} nats" in page
    assert "0 patches" in blt.patch("")._repr_html_()
