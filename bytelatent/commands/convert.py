"""Models from one format to another."""

from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from bytelatent.errors import Interrupted
from bytelatent.log import Console
from bytelatent.weights import check_target, convert, open_pretrained


def convert_model(
    source: str,
    target: str,
    format: str,
    entropy: str | None,
    revision: str | None,
    licence: str | None,
    console: Console,
) -> Path:
    """Write a model in another format; its weights pass through in pieces, so that memory does not limit its size.

    Raises:
        UserError: the model is not there or not whole, or the format has no room for one of its settings.
        Interrupted: by Ctrl-C; nothing is written then.
    """
    check_target(Path(target), format, licence)
    found = open_pretrained(source, entropy, revision)
    for line in (found.in_a_line(), *found.warnings):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=found.num_bytes)
        try:
            convert(found, Path(target), format, licence, lambda written: progress.advance(task, written))
        except KeyboardInterrupt:
            raise Interrupted(f"'{target}' was not written; the same command begins again") from None
    return Path(target)
