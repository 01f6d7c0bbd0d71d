"""The command `blt` as `python -m bytelatent.cli`."""

from bytelatent.cli import main

if __name__ == "__main__":
    main()
