"""The options that several verbs share."""

from typing import Annotated

import typer

DEFAULT_MODEL = "runs/demo"

ModelOption = Annotated[str, typer.Option("--model", "-m", help="A run, or a folder with a model.")]
EntropyOption = Annotated[
    str | None, typer.Option(help="The byte LM (entropy model), if it stands neither inside the model nor beside it.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Of a repository: a branch, a tag or a commit.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
