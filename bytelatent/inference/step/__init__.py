"""Decoding at a GPU's speed: one step for all slots, in fixed shapes, that never waits for the host.

`packed_weights` holds a model's matrices as the kernels read them, `prefill` reads prompts with them. `step` is the
decode step: `sampling` draws, `patching` decides where patches start, `drafting` does several bytes at once. `slots`
captures a step in a CUDA graph (`cuda_graph`) and replays it; `sized_slots` has several such sets.
"""

from bytelatent.device import outside_inference_mode
from bytelatent.errors import UserError
from bytelatent.inference.decoder import Decoder
from bytelatent.inference.engine import Engine
from bytelatent.inference.quantize import quantize_model
from bytelatent.inference.settings import Quantization, check_limits
from bytelatent.inference.step.packed_weights import has_cross_attention, supports
from bytelatent.inference.step.prefill import PrefillDecoder
from bytelatent.inference.step.sized_slots import SizedSlots
from bytelatent.inference.step.slots import CapturedSlots
from bytelatent.model import BLTModel, ByteLM, LanguageModel, TokenLM
from bytelatent.model.settings import NAMES
from bytelatent.patching import PatchSettings
from bytelatent.vocab import BYTES, Vocabulary

QUORUM = 1 / 3  # of slots whose patches the global transformer waits for on a GPU; one of up to three slots is enough


@outside_inference_mode
def engine_for(
    model: BLTModel | LanguageModel,
    patching: PatchSettings | None,
    byte_lm: ByteLM | None,
    batch_size: int,
    quantize: Quantization = "full",
    draft_length: int = 1,
    vocabulary: Vocabulary = BYTES,
    varies: bool = False,
) -> Engine:
    """The fastest engine that can decode this model where it is.

    Args:
        byte_lm: the entropy model, where the patching mode needs one.
        batch_size: sequences decoded at once.
        quantize: quantize the model's large matrices to `int8` or `fp8`; the entropy model stays as it is.
        draft_length: speculative decoding: bytes per step at most; 1: no drafts. See `DraftedStep`.
        vocabulary: of the ids of a token LM.
        varies: whether there are often fewer sequences; then steps are faster, and their caches take more memory.

    Raises:
        UserError: this model cannot draft, or a number is out of range.
    """
    check_limits(batch_size=batch_size, draft_length=draft_length)
    device = next(model.parameters()).device.type
    if draft_length > 1 and (why := _why_no_drafts(model, patching, byte_lm, device)):
        raise UserError(f"draft_length: {why}; leave it out")
    model = quantize_model(model, quantize)
    if isinstance(model, TokenLM):
        return Engine.plain(Decoder(model, None, None), batch_size, vocabulary)
    decides_on_host = patching is not None and patching.decides_on_host
    is_changed = _is_changed(model) or (byte_lm is not None and _is_changed(byte_lm))
    if decides_on_host or is_changed or not (device == "cpu" or (device == "cuda" and supports(model, byte_lm))):
        return Engine.plain(Decoder(model, patching, byte_lm), batch_size)
    decoder = (Decoder if device == "cpu" else PrefillDecoder)(model, patching, byte_lm)
    quorum = 0.0 if device == "cpu" else QUORUM

    def slots(count: int, like: CapturedSlots | None = None) -> CapturedSlots:
        return CapturedSlots(decoder, count, quorum, draft_length=draft_length, like=like)

    return Engine(decoder, SizedSlots(slots, batch_size) if varies else slots(batch_size), batch_size)


def _why_no_drafts(
    model: BLTModel | LanguageModel, patching: PatchSettings | None, byte_lm: ByteLM | None, device: str
) -> str | None:
    """Why a model cannot draft; None if it can."""
    if isinstance(model, LanguageModel) or patching is None:
        return f"a {NAMES[model.settings.kind]} has no part that drafts"
    if _is_changed(model):
        return "modules of this model were replaced, as adapters do"
    if not has_cross_attention(model):
        return "a model without cross-attention has no drafts"
    if patching.reset_at_newline:
        return "an entropy model whose context is reset at newlines has no drafts"
    if patching.decides_on_host:
        return f"patching mode '{patching.mode}' has no drafts"
    if device not in ("cpu", "cuda"):
        return f"there are no drafts on {device}"
    if device == "cuda" and not supports(model, byte_lm):
        return "the kernels that draft take heads of 16, 32, 64 ... numbers"
    return None


def _is_changed(model: BLTModel | LanguageModel) -> bool:
    """Whether some module is of another package, as adapters are: the fast step reads matrices, not modules."""
    return any(type(part).__module__.partition(".")[0] not in ("torch", "bytelatent") for part in model.modules())


__all__ = ["QUORUM", "CapturedSlots", "PrefillDecoder", "SizedSlots", "engine_for", "supports"]
