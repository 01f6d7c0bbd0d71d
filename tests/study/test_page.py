"""The page of a study, its pictures and its tables."""

import re
from functools import cache
from pathlib import Path

import pytest

from bytelatent.errors import UserError
from bytelatent.study.analysis import analyse
from bytelatent.study.page import write_study
from bytelatent.study.page_tables import StudyTable, tables_of
from tests.report.report_texts import Page
from tests.study.made_rows import BUDGETS, LAWS, made_row, made_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("study") / "inner"
    rows = [*made_rows(), made_row(name="trial", held_out=None, label="<script>")]
    files = write_study(rows, place)
    assert sorted(files) == sorted(place.iterdir())
    return place


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


@cache
def exact() -> list[StudyTable]:
    return tables_of(analyse(made_rows(noise=0.0, seeds=2)))


def table(title: str) -> StudyTable:
    return next(table for table in exact() if table.title == title)


def test_the_page_asks_for_nothing_outside(html: str) -> None:
    tags = Page(html).tags
    assert not {tag for tag, _ in tags} & {"script", "img", "iframe", "object", "embed", "base", "form", "image"}
    for tag, attributes in tags:
        assert not {"src", "srcset", "poster", "action"} & attributes.keys(), tag
        assert (attributes.get("href") or "#").startswith(("#", "data:,")), tag
    assert not re.findall(r"https?://|@import", html)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_has_each_figure_in_two_sizes_and_its_colours(html: str) -> None:
    assert html.count("<svg") == 5 * 2
    assert "var(--series-1)" in html
    assert not re.findall(r"#0a0[bc]0\d", html)  # stand-ins
    text = Page(html).all_text
    assert all(text.count(label) >= 4 * 2 for label, *_ in LAWS.values())


def test_the_page_says_what_was_found(html: str) -> None:
    text = Page(html).all_text.replace("\u00a0", " ")
    assert all(line in text for line in analyse(made_rows()).summary())
    assert "trials, which never read the held-out text1" in text


def test_pictures_are_small(folder: Path) -> None:
    pictures = sorted(folder.glob("*.png"))
    assert [path.stem for path in pictures] == ["distance", "flops", "inference", "patch_size", "seconds"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 100_000 for path in pictures)


def test_markdown_holds_every_table(folder: Path) -> None:
    text = (folder / "table.md").read_text(encoding="utf-8")
    titles = re.findall(r"^### (.*)$", text, flags=re.MULTILINE)
    assert titles == ["Held-out bits per byte", "Fits", "Distance to the best token LM", "By category", "Cost"]
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1
        assert re.fullmatch(r"\|( :?-+:? \|)+", block.splitlines()[1])
    assert text.startswith("- At 10¹⁷ training FLOPs, “token LM, BPE of 16k” needs ")


def test_results_by_hand() -> None:
    found = table("Held-out bits per byte")
    assert found.header == ["family", "10¹⁶", "3×10¹⁶", "10¹⁷"]
    rows = {row[0]: row[1:] for row in found.rows}
    assert rows["token LM, BPE of 16k"] == ["1.205 (2)", "1.135", "1.062"]
    assert rows["flat byte LM"][-1] == "1.251"
    assert found.best == {(1, 1), (1, 2), (1, 3)}
    assert "| **1.062** |" in found.markdown()


def test_distances_by_hand() -> None:
    rows = {row[0]: row[1:] for row in table("Distance to the best token LM").rows}
    assert rows["token LM, BPE of 16k"] == ["best", "best", "best", "–", "–"]
    assert rows["BLT, entropy, 4.5 bytes per patch"][:4] == [
        "+0.085 ± 0.000",
        "+0.055 ± 0.000",
        "+0.026 ± 0.000",
        "3.6×10¹⁷",
    ]
    assert rows["flat byte LM"][3] == "beyond 10¹⁹"


def test_categories_and_cost_by_hand() -> None:
    found = table("By category")
    assert found.header == ["FLOPs", "family", "prose", "documentation", "code", "other languages", "all"]
    assert found.rows[1] == ["10¹⁷", "token LM, BPE of 16k", "1.168", "0.956", "0.743", "1.381", "1.062"]
    assert found.best == {(row, column) for row in (1, 11, 21) for column in range(2, 7)}
    cost = {tuple(row[:2]): row[2:] for row in table("Cost").rows}
    blt = cost["10¹⁶", "BLT, entropy, 4.5 bytes per patch"]
    assert blt == ["30 M", "1.84 GB", "250 MB", "1.32", "4.50", "40", "13.3", "1 min 40 s", "3,250,000", "1.2×10¹⁵"]
    assert cost["10¹⁷", "token LM, BPE of 8k"][1] == "–"
    assert len(cost) == len(LAWS) * len(BUDGETS)


def test_a_study_that_has_only_begun(tmp_path: Path) -> None:
    write_study([made_row(bytes_per_second=None, label="<script>a|b $x$</script>")], tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (.*)$", text, flags=re.MULTILINE) == ["Held-out bits per byte", "By category", "Cost"]
    assert "a\\|b" in text
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "No token LM has finished yet" in html
    assert "<script" not in html
    assert "<script>a|b $x$</script>" in Page(html).all_text
    with pytest.raises(UserError, match="no row has bits per byte of held-out text"):
        write_study([], tmp_path)
