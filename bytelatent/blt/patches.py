"""The patches of a text, as a list that a notebook shows in colours."""

from collections.abc import Iterable

from bytelatent.patching import Patch


class Patches(list[Patch]):
    """
    Attributes:
        mode: the patching mode, for the line above them.
        threshold: nats, where entropies are compared with one.
    """

    def __init__(self, patches: Iterable[Patch] = (), mode: str = "", threshold: float | None = None):
        super().__init__(patches)
        self.mode, self.threshold = mode, threshold

    def _repr_html_(self) -> str:
        from bytelatent.report.notebook import patches_in_notebook

        return patches_in_notebook(self.mode, self, self.threshold)
