"""The options that several verbs share."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from bytelatent.errors import UserError

DEFAULT_MODEL = "runs/demo"
MAX_BAD_ROWS = 100  # as bytelatent.text has it, which would take its time to import
MAX_ROW_BYTES = 64 << 20
LONGEST_ROW = 2**31 - 2
LARGEST = 2**63 - 1


def bounded(least: float, most: float = LARGEST) -> Callable[..., Any]:
    """A callback that takes numbers from `least` to `most`; typer's own bounds let through what is no number."""

    def check(option: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not least <= value <= most:
            raise UserError(f"{option.opts[0]}: {value} will not do; it takes {least:g} to {int(most):,}")
        return value

    return check


def named(option: typer.CallbackParam, value: str) -> str:
    """A callback that refuses an empty path, as of an unset variable: it would be the folder that one is in."""
    if not value.strip():
        raise UserError(f"{option.opts[0]}: the path is empty; name a folder")
    return value


ModelOption = Annotated[str, typer.Option("--model", "-m", help="A run, or a folder with a model.")]
EntropyOption = Annotated[
    str | None, typer.Option(help="The byte LM (entropy model), if the model's folder does not hold it.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")]
DeviceOption = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or mps.")]
TextKeyOption = Annotated[str, typer.Option(help="The key or column that holds the text.")]
MaxBadRowsOption = Annotated[int, typer.Option(min=0, help="Largest number of bad rows and files to pass over.")]
MaxRowBytesOption = Annotated[
    int,
    typer.Option(callback=bounded(1, LONGEST_ROW), help="Longest row, in bytes. A longer row is a bad row."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def bad_rows(given: int, old: int | None, old_name: str) -> int:
    """The limit, also where it is given by its old name, which is hidden."""
    if old is None:
        return given
    from bytelatent.config import say_renamed

    say_renamed(old_name, "--max-bad-rows")
    return old
