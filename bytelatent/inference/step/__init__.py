"""Decoding at a GPU's speed: one step for all slots, in fixed shapes, that never waits for the host.

`packed_weights` holds a model's matrices as the kernels read them, `prefill` reads prompts with them. `step` is the
decode step: `sampling` draws, `patching` decides where patches start. `slots` captures a step in a CUDA graph
(`cuda_graph`) and replays it; `sized_slots` has several such sets.
"""

from bytelatent.device import outside_inference_mode
from bytelatent.inference.decoder import Decoder
from bytelatent.inference.engine import Engine
from bytelatent.inference.quantize import quantize_model
from bytelatent.inference.settings import KVCacheNumbers, Quantization, check_kv_cache, check_limits
from bytelatent.inference.step.packed_weights import supports
from bytelatent.inference.step.prefill import PrefillDecoder
from bytelatent.inference.step.sized_slots import SizedSlots
from bytelatent.inference.step.slots import CapturedSlots
from bytelatent.model import BLTModel, ByteLM, LanguageModel, TokenLM
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
    vocabulary: Vocabulary = BYTES,
    varies: bool = False,
    kv_cache: KVCacheNumbers = "full",
) -> Engine:
    """The fastest engine that can decode this model where it is.

    Args:
        byte_lm: the entropy model, where the patching mode needs one.
        batch_size: sequences decoded at once.
        quantize: quantize the model's large matrices to `int8` or `fp8`; the entropy model stays as it is.
        vocabulary: of the ids of a token LM.
        varies: whether there are often fewer sequences; then steps are faster, and their caches take more memory.
        kv_cache: `int8`: KV caches in 8 bits.

    Raises:
        UserError: `batch_size` is out of range, or there are no such KV caches.
    """
    check_limits(batch_size=batch_size)
    check_kv_cache(kv_cache)
    device = next(model.parameters()).device.type
    model = quantize_model(model, quantize)
    if isinstance(model, TokenLM):
        return Engine.plain(Decoder(model, None, None, kv_cache), batch_size, vocabulary)
    decides_on_host = patching is not None and patching.decides_on_host
    is_changed = _is_changed(model) or (byte_lm is not None and _is_changed(byte_lm))
    if decides_on_host or is_changed or not (device == "cpu" or (device == "cuda" and supports(model, byte_lm))):
        return Engine.plain(Decoder(model, patching, byte_lm, kv_cache), batch_size)
    decoder = (Decoder if device == "cpu" else PrefillDecoder)(model, patching, byte_lm, kv_cache)
    quorum = 0.0 if device == "cpu" else QUORUM

    def slots(count: int, like: CapturedSlots | None = None) -> CapturedSlots:
        return CapturedSlots(decoder, count, quorum, like=like)

    return Engine(decoder, SizedSlots(slots, batch_size) if varies else slots(batch_size), batch_size)


def _is_changed(model: BLTModel | LanguageModel) -> bool:
    """Whether some module is of another package, as adapters are: the fast step reads matrices, not modules."""
    return any(type(part).__module__.partition(".")[0] not in ("torch", "bytelatent") for part in model.modules())


__all__ = ["QUORUM", "CapturedSlots", "PrefillDecoder", "SizedSlots", "engine_for", "supports"]
