"""`blt patch`: the patches of a text in any patching mode."""

import logging
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

from bytelatent.blt import BLT
from bytelatent.commands.options import DEFAULT_PATCH_BYTES, PatchesSettings, default_model, model_named
from bytelatent.data import Patcher, patches_of
from bytelatent.errors import UserError
from bytelatent.inference import prompt_ids
from bytelatent.inference.scoring import entropies_of
from bytelatent.log import Console
from bytelatent.model import ByteLM, ByteLMSettings, pack_rows
from bytelatent.patching import MODES, Patch, PatchSettings, calibrate
from bytelatent.report import patched_text, write_patches_page
from bytelatent.terminal import print_json, print_line
from bytelatent.vocab import to_bytes
from bytelatent.weights import load, open_pretrained

OWN = "model"
MONOTONIC = "monotonic"  # names mode `entropy` with `monotonicity`
LOGGER = logging.getLogger(__name__)


def run(settings: PatchesSettings) -> None:
    text = standard_input() if settings.text is None else settings.text
    without_model = " -- or take modes that need no model: --mode space,static:4"
    modes = PatchingModes(model_named(settings), settings.context, settings.threshold, without_model)
    patched = modes.patched([name.strip() for name in settings.mode.split(",")], text)
    if settings.as_json:
        print_json({name: [vars(patch) for patch in patches] for name, patches in patched.items()})
    elif settings.html is not None:
        write_patches_page(settings.html, patched, "Patches", modes.thresholds)
        print_line(str(settings.html))
    else:
        console = Console()
        for name, patches in patched.items():
            console.print(patched_text(name, patches, settings.entropies))


def standard_input() -> bytes:
    if sys.stdin.isatty():
        raise UserError("no text: give it as an argument, or pipe it in")
    return sys.stdin.buffer.read()


class PatchingModes:
    """Patching settings by name, with one model for all that need its byte LM.

    Args:
        source: where the model is, a BLT or a byte LM, read only when a mode needs it; None: `default_model`.
        context: ids that are read at once, without those before them; None: the whole text, as the model uses it.
        else_take: the way out where there is no such model.

    Attributes:
        thresholds: of the entropy modes that compare an entropy itself with one, by their names.
    """

    def __init__(
        self, source: str | None, context: int | None = None, threshold: float | None = None, else_take: str = ""
    ):
        if context is not None and context < 1:
            raise UserError(f"context: {context} is too small; it takes the number of ids read at once, 1 or more")
        self.given, self.context, self.threshold, self.else_take = source, context, threshold, else_take
        self.thresholds: dict[str, float] = {}

    @cached_property
    def source(self) -> str:
        return default_model() if self.given is None else self.given

    @cached_property
    def model(self) -> BLT | ByteLM:
        try:
            if isinstance(open_pretrained(self.source, weights=False).config.model, ByteLMSettings):
                byte_lm = load(self.source).model.float()
                assert isinstance(byte_lm, ByteLM)
                return byte_lm
            return BLT.from_pretrained(self.source)
        except UserError as error:
            raise UserError(f"{error}{self.else_take}") from None

    def patched(self, names: Sequence[str], text: str | bytes) -> dict[str, list[Patch]]:
        """The patches of a text in each mode, by the name of the mode that is shown.

        Raises:
            UserError: there is no such mode, or no model for it.
        """
        data, found = to_bytes(text), {}
        for name in names:
            shown, patching = self._named(name, data)
            byte_lm = None
            if patching.needs_entropies:
                assert patching.threshold is not None
                byte_lm = self._byte_lm()
                if not patching.monotonicity:
                    self.thresholds[shown] = patching.threshold
            patcher = Patcher(patching, byte_lm, entropies_of=partial(entropies_of, byte_lm) if byte_lm else None)
            found[shown] = patches_of(data, patcher, self.context)
        return found

    def _byte_lm(self) -> ByteLM:
        byte_lm = self.model if isinstance(self.model, ByteLM) else self.model.entropy_model
        if byte_lm is None:
            raise UserError(f"patch: '{self.source}' has no byte LM, which finds patches by entropy; name one: --model")
        return byte_lm

    def _named(self, name: str, data: bytes) -> tuple[str, PatchSettings]:
        """Patching settings, and the name that is shown for them."""
        if name in (OWN, "entropy"):
            return self._own(name, data)
        mode, _, value = name.partition(":")
        values: dict[str, Any] = {"mode": mode}
        if mode == MONOTONIC:
            values = {"mode": "entropy", "monotonicity": True}
        its = MODES.get(values["mode"])
        if its is None or bool(value) != bool(its.named_by):
            raise UserError(f"patch: no mode '{name}'; modes: {mode_names()}")
        if its.named_by:
            values[its.named_by] = value
        return name, PatchSettings.parse(values, where=name)

    def _own(self, asked: str, data: bytes) -> tuple[str, PatchSettings]:
        """The model's patching settings; for a byte LM, which has none, a threshold that suits this text."""
        if isinstance(self.model, ByteLM):
            if self.threshold is not None:
                return "entropy", PatchSettings(mode="entropy", threshold=self.threshold)
            patching = PatchSettings(mode="entropy", threshold=self._threshold(self.model, data))
            LOGGER.info(
                f"'{self.source}' is a byte LM, which has no threshold: {patching.threshold:.4g} nats gives patches of "
                f"about {DEFAULT_PATCH_BYTES} bytes on this text; another one: --threshold {patching.threshold:.2f}"
            )
            return "entropy", patching
        patching = self.model.patching
        if self.threshold is not None:
            if not patching.needs_entropies:
                raise UserError(f"threshold: '{self.source}' has patches by {patching.in_words()}; leave it out")
            patching = PatchSettings.parse({**patching.plain(), "threshold": self.threshold}, "--threshold")
        shown = patching.name
        if asked != OWN and shown != asked:
            LOGGER.info(f"'{self.source}' finds its patches by '{shown}', which is shown in place of '{asked}'")
        return shown, patching

    def _threshold(self, byte_lm: ByteLM, data: bytes) -> float:
        if not data:
            return 0.0
        stream = pack_rows([prompt_ids(data)]).to(next(byte_lm.parameters()).device)
        found = entropies_of(byte_lm, stream)
        wanted = min(DEFAULT_PATCH_BYTES, len(data))  # a short text has no longer patch
        return calibrate(stream.ids, found, stream.position, wanted).threshold


def mode_names() -> str:
    """What `--mode` takes."""
    settings = {mode: its.named_by for mode, its in MODES.items()} | {MONOTONIC: MODES["entropy"].named_by}
    names = [f"{mode}:{setting.upper()}" if setting else mode for mode, setting in settings.items()]
    return ", ".join([OWN, "entropy", *names])
