"""The patches of a text under any rule, by the rule's name."""

from functools import cached_property

from bytelatent.blt import BLT
from bytelatent.data import Patcher, patches_of
from bytelatent.errors import UserError
from bytelatent.patching import Patch, PatchSettings
from bytelatent.vocab import to_bytes

CONTEXT = 8192
NAMES = "entropy, entropy:THRESHOLD, monotonic:THRESHOLD, space, byte, static:SIZE, bpe:tokenizer.json"


class Rules:
    """Rules by name, one model for all that need its byte LM.

    Args:
        model: where the model is; read only when a rule needs it.
    """

    def __init__(self, model: str):
        self.source = model
        self.thresholds: dict[str, float] = {}

    @cached_property
    def model(self) -> BLT:
        return BLT.from_pretrained(self.source)

    def patches(self, name: str, text: str | bytes) -> list[Patch]:
        """The patches of a text under the rule `name`.

        Raises:
            UserError: there is no such rule, or no model for it.
        """
        rule = self._rule(name)
        byte_lm = None
        if rule.needs_entropies:
            assert rule.threshold is not None
            byte_lm, self.thresholds[name] = self.model.byte_lm, rule.threshold
        context = self.model.context if rule.needs_entropies else CONTEXT
        return patches_of(to_bytes(text), Patcher(rule, byte_lm), context)

    def _rule(self, name: str) -> PatchSettings:
        mode, _, value = name.partition(":")
        try:
            if mode in ("space", "byte") and not value:
                return PatchSettings(mode=mode)
            if mode == "static" and value:
                return PatchSettings.parse({"mode": mode, "patch_size": int(value)}, where=name)
            if mode == "bpe" and value:
                return PatchSettings(mode=mode, tokenizer=value)
            if mode == "monotonic" and value:
                return PatchSettings(mode="entropy", threshold=float(value), monotonicity=True)
            if mode == "entropy":
                return PatchSettings(mode=mode, threshold=float(value)) if value else self._own()
        except UserError:
            raise
        except ValueError:
            pass
        raise UserError(f"patch: no rule '{name}'; rules: {NAMES}")

    def _own(self) -> PatchSettings:
        try:
            return self.model.patching
        except UserError as error:
            raise UserError(
                f"{error} -- or take rules that need no model: --rule space, --compare space,static:4"
            ) from None
