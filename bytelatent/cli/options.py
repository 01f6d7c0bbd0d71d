"""The options that several verbs share."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from bytelatent.errors import UserError

DEFAULT_MODEL = "runs/demo"
LARGEST = 2**63 - 1


def bounded(least: float, most: float = LARGEST) -> Callable[..., Any]:
    """A callback that takes numbers from `least` to `most`; typer's own bounds let through what is no number."""

    def check(option: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not least <= value <= most:
            raise UserError(f"{option.opts[0]}: {value} will not do; it takes {least:g} to {most:,.0f}")
        return value

    return check


ModelOption = Annotated[str, typer.Option("--model", "-m", help="A run, or a folder with a model.")]
EntropyOption = Annotated[
    str | None, typer.Option(help="The byte LM (entropy model), if it stands neither inside the model nor beside it.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Of a repository: a branch, a tag or a commit.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
