"""`blt convert`: a model from one format to another."""

import logging
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from bytelatent import log
from bytelatent.commands.options import ConvertSettings
from bytelatent.errors import Interrupted
from bytelatent.terminal import print_line
from bytelatent.weights import StoredModel, check_target, convert, open_pretrained

LOGGER = logging.getLogger(__name__)


def run(settings: ConvertSettings) -> None:
    """Write a model in another format; its weights pass through in pieces, so that memory does not limit its size.

    Raises:
        UserError: there is no model, it is not whole, or the format cannot express one of its settings.
        Interrupted: by Ctrl-C; nothing is written.
    """
    target = Path(settings.target)
    check_target(target, settings.to, settings.licence)
    found = open_pretrained(settings.source, settings.entropy_model, settings.revision)
    LOGGER.info(found.in_a_line())
    for line in found.warnings:
        LOGGER.warning(line)
    write_with_bar(found, target, settings.to, settings.licence)
    print_line(str(target))


def write_with_bar(found: StoredModel, target: Path, format: str, licence: str | None) -> None:
    """Write a model, with a bar where one is shown.

    Raises:
        Interrupted: by Ctrl-C; nothing is written.
    """
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=log.console, transient=True, disable=not log.shows_bars()) as progress:
        task = progress.add_task("", total=found.num_bytes)
        try:
            convert(found, target, format, licence, lambda written: progress.advance(task, written))
        except KeyboardInterrupt:
            raise Interrupted(f"'{target}' was not written; the same command begins again") from None
