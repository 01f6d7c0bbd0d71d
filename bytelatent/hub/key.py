"""A user's key of the hub, which no message shows."""

import sys
from getpass import getpass

from bytelatent.errors import UserError

ASK = ""  # what `--api_key` is where no key follows it


def key_of(given: str | None) -> str | None:
    """The key that an option gives, or that is typed unseen where it is `ASK`; None leaves it to HF_TOKEN.

    Raises:
        UserError: there is no terminal to type at, or it cannot be a key.
    """
    if given is None:
        return None
    if given == ASK and not sys.stdin.isatty():
        raise UserError("--api_key: there is no terminal to ask for the key; set HF_TOKEN to it")
    key = (given or getpass("key of the hub (it is not shown): ")).strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError("--api_key: it is empty, or holds a character that no key has; copy it once more")
    return key
