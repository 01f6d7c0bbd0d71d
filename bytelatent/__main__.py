"""The command `blt`, also as `python -m bytelatent`."""

# Built in: while Python imports `signal`, Ctrl-C would still print a traceback.
import _signal  # pyright: ignore[reportMissingImports]
import os


def listen() -> None:
    """End the process with one line on Ctrl-C until `signals.begin`, unless the process ignores Ctrl-C.

    Raising an exception does not work: modules that are being imported swallow it or raise another one. A command
    calls this before it imports anything.
    """

    def end(*_: object) -> None:
        try:
            os.write(2, b"stopped\n")
        finally:
            os._exit(130)  # signals.STOPPED

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, end)


def main(arguments: list[str] | None = None) -> None:
    """Run `blt`, with the process's own arguments if none are given, and end the process."""
    listen()
    from bytelatent.cli import main as run

    run(arguments)


if __name__ == "__main__":
    main()
