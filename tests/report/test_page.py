import math
import os
import re
from pathlib import Path

import pytest

from bytelatent.errors import UserError
from bytelatent.report import RunReport, write_patches_page, write_report
from bytelatent.report.page_figures import STRIP_HEIGHT, entropy_strip
from bytelatent.report.runs import curve_points
from tests.report.report_texts import Page, patched

TEXT = 'Ça va? <script>alert("x")</script> & 😀\n\tété\x00'
DATA = TEXT.encode()
ENTROPIES = [0.01 * i for i in range(len(DATA))]
PATCHES = patched(DATA, [1, 5, 9, 30, 39, 41], ENTROPIES)  # 1 cuts a character, 39 the emoji


def full_report() -> RunReport:
    training = [{"step": i, "bytes_seen": 1000 * i, "bits_per_byte": 8 - i / 200, "lr": 1.0} for i in range(1, 1001)]
    validation = [{"step": i, "bytes_seen": 1000 * i, "validation_bits_per_byte": 8 - i / 210} for i in (500, 1000)]
    return RunReport(
        title="<script>title</script>",
        summary={
            "bits_per_byte": {"xz": 2.5, "blt": 1.25, "byte_lm": float("nan")},
            "undertrained": "the BLT did <script> 14 training steps",
            "mean_patch_bytes": 4.567,
            "threshold": 0.3,
            "seconds": 260.4,
            "training_seconds": 200.4,
            "bytes_read": {"byte_lm": 3_300_000, "blt": 4_200_000},
            "steps": {"byte_lm": 1611, "blt": 2051},
            "parameters": {"byte_lm": 600_000, "blt": 4_100_000},
            "train_bytes": 9_900_000,
            "sample": "unused",
            "sizes": {"blt": 12},
        },
        curves={"byte LM": training[:100], "BLT <script>": [*training, *validation]},
        texts={"held-out": PATCHES},
        patch_lengths=[1, 2, 2, 100],
        threshold=0.3,
        samples=[("<script>p", "c</script>\x00 http://example.org")],
        notes=["a <script>note</script>"],
    )


def written(path: Path, report: RunReport) -> str:
    write_report(path, report)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def report_html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("report") / "report.html", full_report())


@pytest.fixture
def patches_html(tmp_path: Path) -> str:
    write_patches_page(tmp_path / "p.html", {"entropy": PATCHES}, "Title", {"entropy": 0.3})
    return (tmp_path / "p.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("which", ["report_html", "patches_html"])
def test_nothing_outside_the_file_is_asked_for(which: str, request: pytest.FixtureRequest) -> None:
    html = request.getfixturevalue(which)
    tags = Page(html).tags
    assert not {tag for tag, _ in tags} & {"script", "img", "iframe", "object", "embed", "base", "form", "image"}
    for tag, attributes in tags:
        assert not {"src", "srcset", "xlink:href", "poster", "action"} & attributes.keys(), tag
        assert (attributes.get("href") or "#").startswith(("#", "data:,")), tag
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", html))
    assert re.findall(r"https?://[^\s<\"]*", html) == (["http://example.org"] if which == "report_html" else [])


def test_text_and_samples_are_escaped(report_html: str) -> None:
    assert "<script" not in report_html
    read = Page(report_html).all_text
    for text in ("<script>title</script>", "<script>pc</script>", "BLT <script>", "a <script>note</script>"):
        assert text in read


def test_every_byte_appears_once_and_shows_its_entropy(patches_html: str) -> None:
    facts = "\n".join(Page(patches_html).facts)
    shown = re.findall(r"^byte (\d+).* entropy ([\d.]+) nats = ([\d.]+) bits$", facts, flags=re.MULTILINE)
    assert [int(offset) for offset, _, _ in shown] == list(range(len(DATA)))
    assert [float(nats) for _, nats, _ in shown] == pytest.approx(ENTROPIES, abs=0.0051)
    assert [float(bits) for _, _, bits in shown] == pytest.approx([e / math.log(2) for e in ENTROPIES], abs=0.0051)
    values = {int(offset): int(value, 16) for offset, value in re.findall(r"byte (\d+) · 0x(..)", facts)}
    assert len(values) == len(DATA) - 2 - 4  # all but the two cut characters
    assert all(DATA[offset] == value for offset, value in values.items())


def test_patches_read_as_they_are(patches_html: str) -> None:
    shown = [patch.text.replace("\n", "↵\n").replace("\t", "⇥").replace("\x00", "␀") for patch in PATCHES]
    marks_joined = [re.sub("�+", "�", patch) for patch in Page(patches_html).patches]
    assert marks_joined == [re.sub("�+", "�", text) for text in shown]


def test_invalid_utf8_is_one_mark_a_byte(tmp_path: Path) -> None:
    data = b"a\xff\xfe\x80b\xf0\x9f"
    write_patches_page(tmp_path / "p.html", {"static": patched(data, [3])}, "t")
    page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert page.patches == ["a��", "�b��"]
    assert re.findall(r"byte (\d+)", "\n".join(page.facts)) == [str(i) for i in range(len(data))]
    assert "entropy" not in "\n".join(page.facts)


def test_threshold_is_drawn_only_where_given(tmp_path: Path) -> None:
    write_patches_page(tmp_path / "p.html", {"a": PATCHES, "b": PATCHES, "c": patched(DATA, [])}, "t", {"b": 0.3})
    html = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert html.count('<line class="threshold"') == 1
    assert html.count('<path class="a"') == 2


def test_strip_has_a_bar_a_byte(patches_html: str) -> None:
    paths = [attributes["d"] for tag, attributes in Page(patches_html).tags if tag == "path"]
    assert sum((path or "").count("M") for path in paths) == len(DATA)


def test_strip_is_as_tall_as_the_entropies() -> None:
    strip = entropy_strip(patched(b"abc", [1], [2.0, 1.0, 0.0]), threshold=0.5)
    assert strip is not None
    tops = [float(y) for path in strip.bars for y in re.findall(r"V([\d.]+)h", path)]
    assert tops == [0, STRIP_HEIGHT / 2, STRIP_HEIGHT]
    assert strip.threshold == STRIP_HEIGHT * 3 / 4
    assert [label for _, label in strip.labels] == ["a", "b", "c"]


def test_summary_as_people_read_it(report_html: str) -> None:
    read = Page(report_html).all_text
    for text in ("4.57 bytes", "4.2 MB", "3 min 20 s", "4 min 20 s", "0.3", "1.250", "2.500", "sizes: blt", "12"):
        assert text in read
    rows = re.findall(r'<th scope="row">(.*?)</th>.*?width: ([\d.]+)%.*?<td>(.*?)</td></tr>', report_html)
    assert rows == [("BLT", "41.7", "1.250"), ("xz", "83.3", "2.500"), ("byte LM", "0.0", "–")]  # of 3 bits


def test_bars_have_an_axis_in_whole_bits(report_html: str) -> None:
    ticks = re.findall(r'<span style="left: ([\d.]+)%">(\d+)</span>', report_html)
    assert [(float(left), int(bits)) for left, bits in ticks] == [(0, 0), (33.33, 1), (66.67, 2), (100, 3)]


def test_each_model_has_what_it_was_trained_on(report_html: str) -> None:
    [table] = re.findall(r'<table class="models">(.*?)</table>', report_html, flags=re.DOTALL)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    assert rows == [
        ["", "parameters", "training steps", "text read"],
        ["byte LM", "0.6 M", "1,611", "3.3 MB"],
        ["BLT", "4.1 M", "2,051", "4.2 MB"],
    ]


def test_an_undertrained_model_is_named_before_its_numbers(report_html: str) -> None:
    read = Page(report_html).all_text
    assert read.index("the BLT did <script> 14 training steps") < read.index("4.57 bytes")


def test_figures_take_their_colours_from_the_page_and_share_no_ids(report_html: str) -> None:
    assert report_html.count("<svg") == 2 * 2 + 2
    assert "var(--series-2)" in report_html
    assert "#0a0" not in report_html
    ids = [attributes["id"] for _, attributes in Page(report_html).tags if "id" in attributes]
    assert ids
    assert len(ids) == len(set(ids))
    targets = [a["href"] for _, a in Page(report_html).tags if (a.get("href") or "").startswith("#")]
    assert targets
    assert {target[1:] for target in targets if target} <= set(ids)


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "font.size", 7.0)
    before = dict(matplotlib.rcParams)
    write_report(tmp_path / "r.html", full_report())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "report",
    [
        RunReport(title="empty"),
        RunReport(
            title="no numbers",
            summary={"bits_per_byte": {"blt": float("nan"), "xz": None}, "threshold": float("nan"), "seconds": None},
            curves={"BLT": [], "byte LM": [{"step": 1}, {"bytes_seen": 1, "bits_per_byte": float("nan")}]},
            texts={"nothing": [], "strange": patched(b"abc", [1], [float("nan"), 1.0, float("inf")])},
            threshold=float("nan"),
        ),
        RunReport(title="one point", curves={"BLT": [{"bytes_seen": 0, "bits_per_byte": 8.0}]}, patch_lengths=[1]),
        RunReport(title="flat", texts={"sure": patched(b"ab", [], [0.0, 0.0])}, threshold=0.0),
    ],
    ids=lambda report: report.title,
)
def test_little_or_nothing_to_show(tmp_path: Path, report: RunReport) -> None:
    html = written(tmp_path / "r.html", report)
    assert html.rstrip().endswith("</html>")
    assert "How it learned" in html
    assert not re.search(r">\s*(nan|None|inf)\b", html)
    assert not re.search(r'(d|x|y|y1)="[^"]*(nan|None|inf)', html)


def test_sample_of_the_summary_stands_in_for_samples(tmp_path: Path) -> None:
    report = RunReport(title="t", summary={"sample": "the written words"})
    assert "the written words" in written(tmp_path / "r.html", report)


def test_a_resumed_run_counts_each_moment_once() -> None:

    rows = [{"bytes_seen": x, "bits_per_byte": y} for x, y in ((2, 7), (3, 6), (1, 8), (2, 5), (3, 4))]
    assert curve_points(rows, "bits_per_byte") == ([1, 2, 3], [8, 5, 4])


def test_folders_are_made_and_no_other_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "r.html"
    write_report(path, RunReport(title="t"))
    assert os.listdir(path.parent) == ["r.html"]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("before")

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match="disk is full"):
        write_report(path, RunReport(title="t"))
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["r.html"]


def test_what_was_there_stays_when_the_last_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("before")

    def refuse(source: Path, target: Path) -> None:
        assert Path(source).parent == target.parent  # a rename is whole only within a folder's file system
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        write_report(path, RunReport(title="t"))
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["r.html"]


def test_an_unwritable_path_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "r.html", tmp_path):
        with pytest.raises(UserError) as caught:
            write_patches_page(path, {}, "t")
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
