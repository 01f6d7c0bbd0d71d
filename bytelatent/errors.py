"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Bad input: a path, a key, a file. The message is one line naming the thing, the value and the way out.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        # A value that a user gave, or the message of a library, may hold line breaks.
        super().__init__(" ".join(message.split()))


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, else the empty string."""
    import difflib

    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
