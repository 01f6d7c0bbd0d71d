"""`python -m bytelatent.stool key=value`, as published: `blt launch`."""

import sys

from bytelatent import signals
from bytelatent.errors import guarded

if __name__ == "__main__":
    signals.listen()  # before the imports, which take seconds
    from bytelatent.commands.launch import command

    signals.begin()
    guarded(lambda: command(sys.argv[1:]))
