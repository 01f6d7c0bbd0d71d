"""How much damage is passed over."""

from collections.abc import Callable

from bytelatent.errors import UserError
from bytelatent.text.places import Damaged


class DamageLimit:
    """Counts and names damaged rows and files.

    Args:
        limit: one more is an error; 0 makes each an error.
        name: of the setting that holds the limit, for the error.
        say: is told of each that is passed over.
    """

    def __init__(self, limit: int, name: str, say: Callable[[str], None] = lambda line: None):
        self.limit, self.name, self.say = limit, name, say
        self.count = 0

    def __call__(self, error: Damaged) -> None:
        """Pass over one.

        Raises:
            UserError: it is one too many.
        """
        self.count += 1
        line = str(error).rstrip(".")
        if self.count > self.limit:
            more = f"; {self.limit} damaged rows or files were passed over already ({self.name})" if self.limit else ""
            raise UserError(line + more)
        self.say(f"{line}; passed over ({self.count} of at most {self.limit})")
