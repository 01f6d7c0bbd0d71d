"""Files that appear whole or not at all."""

import os
from pathlib import Path

from bytelatent.errors import UserError


def write_whole(path: str | Path, text: str) -> None:
    """Write the text as UTF-8 beside its place, then move it there; missing folders are made.

    Raises:
        UserError: the file cannot be written. What was there before is untouched.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(text.encode("utf-8", "backslashreplace"))
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}); name a file in a folder you may write to") from error
