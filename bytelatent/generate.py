"""`python -m bytelatent.generate key=value`, as published: `blt generate`."""

import sys

if __name__ == "__main__":
    from bytelatent.__main__ import listen

    listen()  # before the imports, which take seconds
    from bytelatent import signals
    from bytelatent.commands import import_uncollected
    from bytelatent.errors import guarded

    generate = import_uncollected("bytelatent.commands.generate")
    signals.begin()
    guarded(lambda: generate.main(sys.argv[1:]))
