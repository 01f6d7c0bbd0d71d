"""The command `blt`, also as `python -m bytelatent`."""

from bytelatent import interrupt


def main() -> None:
    """Run `blt` with the process's arguments."""
    interrupt.listen()
    from bytelatent.cli import main as run

    run()


if __name__ == "__main__":
    main()
