"""`python -m bytelatent.generate key=value`, as published: `blt generate`."""

import sys

from bytelatent import interrupt
from bytelatent.errors import guarded

if __name__ == "__main__":
    interrupt.listen()  # before the imports, which take seconds
    from bytelatent.commands.generate import main

    interrupt.begin()
    guarded(lambda: main(sys.argv[1:]))
