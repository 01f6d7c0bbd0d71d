"""`python -m bytelatent.train config=PATH key=value`: train a byte LM or a BLT."""

import sys
from pathlib import Path

from rich.console import Console

from bytelatent.config import load_yaml, merge
from bytelatent.errors import UserError, guarded
from bytelatent.training import TrainSettings, train

USAGE = "name a configuration or settings: blt train config=apps/bytelatent/configs/byte_lm.yaml run=runs/mine"


def settings_from(arguments: list[str]) -> TrainSettings:
    """Settings from `config=PATH` and `key=value`, later ones winning.

    Raises:
        UserError: a key or value will not do.
    """
    if not arguments:
        raise UserError(USAGE)
    config = [argument.removeprefix("config=") for argument in arguments if argument.startswith("config=")]
    overrides = [argument for argument in arguments if not argument.startswith("config=")]
    values = load_yaml(config[-1]) if config else {}
    where = config[-1] if config and not overrides else ""  # a wrong key may as well stand on the command line
    return TrainSettings.parse(merge(values, overrides), where)


def main(arguments: list[str], console: Console | None = None) -> Path:
    return train(settings_from(arguments), console)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
