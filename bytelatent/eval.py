"""`python -m bytelatent.eval`, as published: `blt eval`."""

import sys

if __name__ == "__main__":
    from bytelatent.__main__ import main

    main(["eval", *sys.argv[1:]])
