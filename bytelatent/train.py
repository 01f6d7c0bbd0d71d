"""`python -m bytelatent.train config=PATH key=value`: train a byte LM or a BLT."""

import sys
from pathlib import Path

from rich.console import Console

from bytelatent.config import from_command_line
from bytelatent.errors import guarded
from bytelatent.training import TrainSettings, train

USAGE = "name a configuration or settings: blt train config=apps/bytelatent/configs/byte_lm.yaml run=runs/mine"


def main(arguments: list[str], console: Console | None = None) -> Path:
    return train(from_command_line(TrainSettings, arguments, USAGE), console)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
