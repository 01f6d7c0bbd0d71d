"""`python -m bytelatent.train config=FILE key=value`, as published: `blt train`, also under torchrun."""

import sys

from bytelatent import log
from bytelatent.commands.train import command
from bytelatent.errors import guarded

if __name__ == "__main__":
    log.configure()
    guarded(lambda: command(sys.argv[1:]))
