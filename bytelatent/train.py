"""`python -m bytelatent.train config=FILE key=value`, as published: `blt train`, also under torchrun."""

import sys

if __name__ == "__main__":
    from bytelatent.__main__ import listen

    listen()  # before the imports, which take seconds
    from bytelatent import log, signals
    from bytelatent.commands.train import command
    from bytelatent.errors import guarded

    log.configure()
    signals.begin()
    guarded(lambda: command(sys.argv[1:]))
