"""The patches of a text under any rule, by the rule's name."""

from collections.abc import Sequence
from functools import cached_property, partial

from bytelatent.blt import BLT
from bytelatent.data import Patcher, patches_of
from bytelatent.errors import UserError
from bytelatent.inference import prompt_ids
from bytelatent.inference.scoring import entropies_of
from bytelatent.model import ByteLM, ByteLMSettings, pack_rows
from bytelatent.patching import Patch, PatchSettings, calibrate
from bytelatent.vocab import to_bytes
from bytelatent.weights import load, open_pretrained

OWN = "model"
NAMES = "model, entropy, entropy:THRESHOLD, monotonic:THRESHOLD, space, byte, static:SIZE, bpe:tokenizer.json"
PATCH_BYTES = 4.5  # wanted where nobody has chosen a threshold


class Rules:
    """Rules by name, one model for all that need its byte LM.

    Args:
        source: where the model is, a BLT or a byte LM; read only when a rule needs it.
        context: ids that are read at once, without those before them; None: the whole text, as the model uses it.

    Attributes:
        thresholds: of the rules by entropy, by their names.
        notes: lines about what is shown, once it is.
    """

    def __init__(self, source: str, context: int | None = None):
        if context is not None and context < 1:
            raise UserError(f"context: {context} will not do; ids read at once, from 1 on")
        self.source = source
        self.context = context
        self.thresholds: dict[str, float] = {}
        self.notes: list[str] = []

    @cached_property
    def model(self) -> BLT | ByteLM:
        try:
            if isinstance(open_pretrained(self.source, weights=False).config.model, ByteLMSettings):
                byte_lm = load(self.source).model.float()
                assert isinstance(byte_lm, ByteLM)
                return byte_lm
            return BLT.from_pretrained(self.source)
        except UserError as error:
            raise UserError(
                f"{error} -- or take rules that need no model: --rule space, --compare space,static:4"
            ) from None

    def patched(self, names: Sequence[str], text: str | bytes) -> dict[str, list[Patch]]:
        """The patches of a text under each of the rules, by the name of the rule that is shown.

        Raises:
            UserError: there is no such rule, or no model for it.
        """
        data, found = to_bytes(text), {}
        for name in names:
            shown, rule = self._rule(name, data)
            byte_lm = None
            if rule.needs_entropies:
                assert rule.threshold is not None
                byte_lm, self.thresholds[shown] = self._byte_lm(), rule.threshold
            patcher = Patcher(rule, byte_lm, entropies_of=partial(entropies_of, byte_lm) if byte_lm else None)
            found[shown] = patches_of(data, patcher, self.context)
        return found

    def _byte_lm(self) -> ByteLM:
        byte_lm = self.model if isinstance(self.model, ByteLM) else self.model.byte_lm
        if byte_lm is None:
            raise UserError(f"patch: '{self.source}' has no byte LM, which finds patches by entropy; name one: --model")
        return byte_lm

    def _rule(self, name: str, data: bytes) -> tuple[str, PatchSettings]:
        """A rule, and the name that says what it is."""
        mode, _, value = name.partition(":")
        try:
            if mode in ("space", "byte") and not value:
                return name, PatchSettings(mode=mode)
            if mode == "static" and value:
                return name, PatchSettings.parse({"mode": mode, "patch_size": int(value)}, where=name)
            if mode == "bpe" and value:
                return name, PatchSettings(mode=mode, tokenizer=value)
            if mode == "monotonic" and value:
                return name, PatchSettings(mode="entropy", threshold=float(value), monotonicity=True)
            if mode == "entropy" and value:
                return name, PatchSettings(mode=mode, threshold=float(value))
        except UserError:
            raise
        except ValueError:
            pass
        if name in (OWN, "entropy"):
            return self._own(name, data)
        raise UserError(f"patch: no rule '{name}'; rules: {NAMES}")

    def _own(self, asked: str, data: bytes) -> tuple[str, PatchSettings]:
        """The model's rule; for a byte LM, which has none, a threshold that suits this text."""
        if isinstance(self.model, ByteLM):
            rule = PatchSettings(mode="entropy", threshold=self._threshold(self.model, data))
            self.notes.append(
                f"'{self.source}' is a byte LM, which has no threshold: {rule.threshold:.4g} nats gives patches of "
                f"about {PATCH_BYTES} bytes on this text; another one: --rule entropy:{rule.threshold:.2f}"
            )
            return "entropy", rule
        rule = self.model.patching
        shown = _name_of(rule)
        if asked != OWN and shown != asked:
            self.notes.append(f"'{self.source}' finds its patches by '{shown}', which is shown in place of '{asked}'")
        return shown, rule

    def _threshold(self, byte_lm: ByteLM, data: bytes) -> float:
        if not data:
            return 0.0
        stream = pack_rows([prompt_ids(data)]).to(next(byte_lm.parameters()).device)
        found = entropies_of(byte_lm, stream)
        wanted = min(PATCH_BYTES, len(data))  # a short text has no longer patch
        return calibrate(stream.ids, found, stream.position, wanted).threshold


def _name_of(rule: PatchSettings) -> str:
    value = {"static": rule.patch_size, "bpe": rule.tokenizer}.get(rule.mode)
    return rule.mode if value is None else f"{rule.mode}:{value}"
