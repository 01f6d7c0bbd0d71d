"""Figures of what a `BLT` finds in texts."""

from collections import Counter
from typing import TYPE_CHECKING

from bytelatent.blt.forward import Text, Texts, as_list
from bytelatent.blt.reading import Reading
from bytelatent.errors import UserError
from bytelatent.vocab import to_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Looking(Reading):
    """matplotlib is imported where a figure is drawn."""

    def plot_entropies(self, text: Text, ax: "Axes | None" = None, context: int | None = None) -> "Axes":
        """Draw the entropy of each byte of a text in the colours of its patches, with the threshold.

        Args:
            text: its first 256 bytes are drawn; `blt plot entropies` draws longer ones in rows.
            ax: where to draw; None: a new figure of pyplot.
            context: as in `patch`.

        Raises:
            UserError: the text is empty, or the model's patches do not come from entropies.
        """
        from bytelatent.report.notebook import draw_entropies_of

        data, patches = to_bytes(text), self.patch(text, context)
        if not data:
            raise UserError("plot_entropies: the text is empty")
        if patches[0].entropies is None:
            raise UserError(f"plot_entropies: the model has patches by {self.patching.in_words()}, without entropies")
        return draw_entropies_of(data, patches, patches.threshold, ax)

    def plot_patches(self, texts: Text | Texts, ax: "Axes | None" = None, context: int | None = None) -> "Axes":
        """Draw how long the patches of a text, or of several, are: the share of each length in bytes, and the mean.

        Args:
            ax: where to draw; None: a new figure of pyplot.
            context: as in `patch`.

        Raises:
            UserError: there are no patches.
        """
        from bytelatent.report.notebook import draw_patch_lengths

        lengths: Counter[int] = Counter()
        for text in as_list(texts):
            lengths.update(patch.end - patch.start for patch in self.patch(text, context))
        if not lengths:
            raise UserError("plot_patches: there is no text to draw")
        return draw_patch_lengths(lengths, ax)
