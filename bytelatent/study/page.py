"""A study's results as one self-contained page, a picture of each figure, and tables in Markdown."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bytelatent.files import whole_file
from bytelatent.report.drawing import ON_PAPER, figure_file, svg_in_page
from bytelatent.report.page import page_templates, write_page
from bytelatent.report.text import amount_of_bytes, duration
from bytelatent.study.analysis import Analysis, analyse
from bytelatent.study.figures import DRAWINGS, SIZES
from bytelatent.study.page_tables import StudyTable, tables_of
from bytelatent.study.results import StudyRow

PAGE, TABLES = "index.html", "table.md"
TEMPLATES = Path(__file__).parent / "templates"


def write_study(rows: Sequence[StudyRow], folder: str | Path, title: str = "Patches and tokens") -> list[Path]:
    """Write `index.html`, a PNG of each figure, and `table.md`.

    Args:
        rows: finished runs; trials without held-out text are counted and left out.
        folder: is made if it is missing.
        title: of the page.

    Returns:
        The files.

    Raises:
        UserError: no run has bits per byte of held-out text, or a file cannot be written.
    """
    folder, analysis = Path(folder), analyse(rows)
    tables = tables_of(analysis)
    files = [folder / PAGE, folder / TABLES, *(folder / f"{name}.png" for name in DRAWINGS)]
    write_page(files[0], _page(analysis, tables, title))
    with whole_file(files[1]) as aside:
        aside.write_text(_markdown(analysis, tables), encoding="utf-8")
    names = "".join(family.label for family in analysis.families)
    for path, draw in zip(files[2:], DRAWINGS.values(), strict=True):
        with figure_file(path, *SIZES["wide"], names) as axes:
            draw(axes, ON_PAPER, analysis)
    return files


def _page(analysis: Analysis, tables: Sequence[StudyTable], title: str) -> str:
    drawings = {
        name: {
            size: svg_in_page(partial(draw, analysis=analysis, labelled=size == "wide"), f"{name}-{size}", *inches)
            for size, inches in SIZES.items()
        }
        for name, draw in DRAWINGS.items()
    }
    return page_templates(TEMPLATES).get_template("study.html").render(
        title=title,
        summary=analysis.summary(),
        drawings=drawings,
        tables={table.title: table for table in tables},
        has_laws=bool(analysis.laws),
        facts=_facts(analysis),
    )  # fmt: skip


def _markdown(analysis: Analysis, tables: Sequence[StudyTable]) -> str:
    lines = "".join(f"- {line}\n" for line in analysis.summary())
    return lines + "\n" + "\n".join(table.markdown() for table in tables)


def _facts(analysis: Analysis) -> list[tuple[str, str]]:
    """How the rows were made, for the end of the page."""
    rows = [row for family in analysis.families for run in family.best.values() for row in run.rows]
    versions = dict.fromkeys(f"{name} {version}" for row in rows for name, version in row.versions.items())
    texts = dict.fromkeys(amount_of_bytes(row.held_out.bytes) for row in rows if row.held_out is not None)
    dates = sorted({row.date for row in rows})
    facts = {
        "runs shown": f"{len(rows)}, the best of each family at each budget and their seeds",
        "time in their training steps": duration(sum(row.seconds for row in rows)),
        "held-out text": ", ".join(texts),
        "devices": ", ".join(dict.fromkeys(row.device for row in rows)),
        "versions": ", ".join(versions),
        "dates": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
    }
    if analysis.num_trials:
        facts["trials, which never read the held-out text"] = str(analysis.num_trials)
    return list(facts.items())
