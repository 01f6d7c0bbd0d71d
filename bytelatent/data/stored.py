"""Whether what is stored with a text is what a run asks for."""

from bytelatent.data.patcher import Patcher
from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings
from bytelatent.text import Stored


class StoredCheck:
    """Complains about stored entropies or starts that another byte LM or another rule made.

    Args:
        patcher: what the run asks for; None where it has no patches and takes only the text.
    """

    def __init__(self, patcher: Patcher | None):
        self.patcher = patcher if patcher is not None and patcher.settings.needs_entropies else None
        self._first: tuple[Stored, str] | None = None

    def __call__(self, stored: Stored, file: str) -> None:
        """Compare with the run's byte LM and rule, and with the files seen before.

        Raises:
            UserError: it names the file and what differs.
        """
        if self.patcher is None:
            return
        if self._first is None:
            self._compare(stored, file, self.patcher)
            self._first = stored, file
        first, first_file = self._first
        for name in ("byte_lm", "window", "dtype", "rule"):
            here, there = getattr(stored, name), getattr(first, name)
            if here != there:
                raise UserError(
                    f"data: '{file}' and '{first_file}' were not made alike ({name}: {here} and {there}); "
                    "make them again with one byte LM: blt entropies"
                )

    def _compare(self, stored: Stored, file: str, patcher: Patcher) -> None:
        if patcher.fingerprint is not None and stored.byte_lm != patcher.fingerprint:
            raise UserError(
                f"data: '{file}' holds the entropies of another byte LM ({stored.byte_lm}; entropy_model is "
                f"{patcher.fingerprint}); name that one, or make them again: blt entropies"
            )
        if patcher.byte_lm is not None and stored.window != patcher.byte_lm.settings.window:
            window = patcher.byte_lm.settings.window
            raise UserError(
                f"data: '{file}' holds entropies of a window of {stored.window} ids; entropy_model has {window}"
            )
        if stored.rule is not None and (rule := PatchSettings.parse(stored.rule, file)) != patcher.settings:
            raise UserError(
                f"data: '{file}' holds the patch starts of another rule ({_shown(rule)}; patching is "
                f"{_shown(patcher.settings)}); use that rule, or store entropies: blt entropies"
            )


def _shown(settings: PatchSettings) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.plain().items() if value not in (None, False))
