"""The options that several verbs share."""

from typing import Annotated

import typer

DEFAULT_MODEL = "runs/demo"
MAX_BAD_ROWS = 100  # as bytelatent.text has it, which would take its time to import
MAX_ROW_BYTES = 64 << 20

ModelOption = Annotated[str, typer.Option("--model", "-m", help="A run, or a folder with a model.")]
EntropyOption = Annotated[
    str | None, typer.Option(help="The byte LM (entropy model), if it stands neither inside the model nor beside it.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Of a repository: a branch, a tag or a commit.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
TextKeyOption = Annotated[str, typer.Option(help="The key or column that holds the text.")]
MaxBadRowsOption = Annotated[int, typer.Option(min=0, help="Bad rows and files to pass over; one more is an error.")]
MaxRowBytesOption = Annotated[int, typer.Option(min=1, help="A longer row, in bytes, is a bad one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def bad_rows(given: int, old: int | None, old_name: str) -> int:
    """The limit, also where it is given by its old name, which is hidden."""
    if old is None:
        return given
    from bytelatent.config import say_renamed

    say_renamed(old_name, "--max-bad-rows")
    return old
