"""Figures as files of their own."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytelatent.errors import UserError
from bytelatent.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")


def format_of(path: Path) -> str:
    """The format that a file's ending names.

    Raises:
        UserError: it is none that we draw.
    """
    kind = path.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise UserError(f"figure: '{path}' should end in one of {', '.join('.' + name for name in FORMATS)}")
    return kind


def write_picture(figure: "Figure", path: Path) -> None:
    """Write a figure in the format that the file's ending names; the same figure is the same bytes.

    Raises:
        UserError: the ending is none that we draw, or the file cannot be written.
    """
    import matplotlib

    kind = format_of(path)
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with matplotlib.rc_context({"svg.hashsalt": "bytelatent"}), whole_file(path) as aside:
        figure.savefig(aside, format=kind, dpi=160, metadata=undated)
