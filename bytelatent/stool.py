"""`python -m bytelatent.stool key=value`, as published: `blt launch`."""

import sys

if __name__ == "__main__":
    from bytelatent.__main__ import listen

    listen()  # before the imports, which take seconds
    from bytelatent import signals
    from bytelatent.commands.launch import command
    from bytelatent.errors import guarded

    signals.begin()
    guarded(lambda: command(sys.argv[1:]))
