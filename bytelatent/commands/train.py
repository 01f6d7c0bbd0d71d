"""`python -m bytelatent.train config=PATH key=value`: train any model, under torchrun with many processes."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bytelatent.command_line import PRINT_CONFIG
from bytelatent.commands import import_uncollected
from bytelatent.commands.options import TrainArguments
from bytelatent.signals import unattended
from bytelatent.terminal import print_line

USAGE = "name a configuration or settings: blt train config=byte_lm run=runs/mine data.train=text/*.jsonl"


def main(arguments: list[str]) -> Path:
    from bytelatent.command_line import from_command_line
    from bytelatent.training import TrainSettings, train
    from bytelatent.training.distributed.ranks import reported_once

    with reported_once():
        settings = from_command_line(TrainSettings, arguments, USAGE)
    return train(settings)


def run(settings: TrainArguments) -> None:
    command([*settings.settings, *([PRINT_CONFIG] if settings.print_config else [])])


def command(arguments: list[str]) -> None:
    """Train; the first of the processes prints the run's folder at the end."""
    with unattended(lambda: import_uncollected("bytelatent.training")):  # which takes seconds
        run = _recorded(main)(arguments)
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # nobody may read it any more, and the run is complete
                print_line(str(run))


def _recorded(call: Callable[..., Any]) -> Callable[..., Any]:
    """Let torchrun, where it started this process, repeat an error at its end."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return call
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(call)
