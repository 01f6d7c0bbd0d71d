"""The command `blt`, also as `python -m bytelatent`."""

from bytelatent import signals


def main(arguments: list[str] | None = None) -> None:
    """Run `blt`, with the process's own arguments if none are given, and end the process."""
    signals.listen()
    from bytelatent.cli import main as run

    run(arguments)


if __name__ == "__main__":
    main()
