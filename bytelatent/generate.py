"""`python -m bytelatent.generate key=value`, as published: `blt generate`."""

import sys

from bytelatent import signals
from bytelatent.errors import guarded

if __name__ == "__main__":
    signals.listen()  # before the imports, which take seconds
    from bytelatent.commands.generate import main

    signals.begin()
    guarded(lambda: main(sys.argv[1:]))
