"""How much damage is passed over."""

from collections.abc import Callable

from bytelatent.errors import UserError
from bytelatent.text.places import Damaged


class DamageLimit:
    """Counts and names damaged rows and files.

    Args:
        limit: one more is an error; 0 makes each an error.
        name: of the setting that holds the limit, for the error.
        say: is told of each that is passed over, once.
        of: what they are counted of, for the error; nothing, or ` of '...'`.
        told: those that were said before, which are only counted: a text is read in calibration and in every epoch.
            What is said is added.
    """

    def __init__(
        self,
        limit: int,
        name: str,
        say: Callable[[str], None] = lambda line: None,
        of: str = "",
        told: set[str] | None = None,
    ):
        self.limit, self.name, self.say, self.of = limit, name, say, of
        self.told = set() if told is None else told
        self.count = 0

    def __call__(self, error: Damaged | str) -> None:
        """Pass over one.

        Raises:
            UserError: it is one too many.
        """
        self.count += 1
        line = str(error).rstrip(".")
        if self.count > self.limit:
            before = f"{self.limit} damaged rows or files{self.of} were passed over already ({self.name})"
            raise UserError(f"{line}; {before}" if self.limit else line)
        if line not in self.told:
            self.told.add(line)
            self.say(f"{line}; passed over ({self.count} of at most {self.limit})")
