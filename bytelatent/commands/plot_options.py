"""Settings of `blt plot`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bytelatent.commands.options import Folder, NumBytes, RowSettings
from bytelatent.config import ARGUMENT, Settings


class PlotEntropiesSettings(Settings):
    """Draw a text's entropies, byte by byte, with the threshold and where patches begin.

    Example:  `blt plot entropies runs/demo "Daenerys Targaryen is in Game of Thrones" --out thrones.png`

    Attributes:
        model: a BLT that finds patches by entropy, or a byte LM: a run, or a folder with a model.
        text: text to draw. Default: standard input.
        out: figure to write: a .png, .svg or .pdf file.
        threshold: threshold in nats, in place of the model's own.
        context: read the text in pieces of this many bytes, as training and eval do. Default: as a whole.
    """

    model: Annotated[str, ARGUMENT]
    text: Annotated[str | None, ARGUMENT] = None
    out: Path = Path("entropies.png")
    threshold: Annotated[float | None, Field(allow_inf_nan=False)] = None
    context: int | None = None


class PlotPatchesSettings(RowSettings):
    """Draw how long the patches of one or several models are, side by side, on the same text.

    Example:  `blt plot patches runs/demo runs/large text/valid.jsonl --out lengths.svg`

    Attributes:
        models: BLTs or byte LMs: runs, or folders with models.
        text: the text: a file, a folder or a glob in quotes.
        out: figure to write: a .png, .svg or .pdf file.
        threshold: threshold in nats, in place of the models' own; a byte LM needs it.
        max_bytes: bytes of text to measure on.
        context: read documents in pieces of this many bytes, as training and eval do. Default: each as a whole.
    """

    models: Annotated[list[str], ARGUMENT]
    text: Annotated[str, ARGUMENT]
    out: Path = Path("patches.png")
    threshold: Annotated[float | None, Field(allow_inf_nan=False)] = None
    max_bytes: NumBytes = 100_000
    context: int | None = None


class PlotRunsSettings(Settings):
    """Draw bits per byte of runs as they train: lines for training text, points for held-out text.

    Example:  `blt plot runs runs/demo runs/mine --against seconds --out curves.svg`

    Attributes:
        folders: folders of runs, or folders that hold them.
        out: figure to write: a .png, .svg or .pdf file.
        against: horizontal axis: bytes, flops or seconds.
    """

    folders: Annotated[list[Path], ARGUMENT]
    out: Path = Path("runs.png")
    against: Literal["bytes", "flops", "seconds"] = "bytes"


class PlotStudySettings(Settings):
    """Write the page of a study from its rows: figures, power laws and tables; also each figure, and the tables.

    Example:  `blt plot study runs/study --out page`

    Attributes:
        folders: folders of studies, folders of rows, or rows.
        out: folder to write: index.html, table.md, and a .png file of each figure.
    """

    folders: Annotated[list[Path], ARGUMENT]
    out: Folder = "study"
