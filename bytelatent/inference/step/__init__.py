"""Decoding at the speed of the card: one byte of every row a step, in fixed shapes, without a word from the host.

`weights` packs a model's matrices as the kernels read them, `prefill` reads prompts with them, `state` is what rows
remember, `step` is the step, `drafted` one of several bytes, `rows` captures either in a CUDA graph and replays it,
reading what was drawn in the background.
"""

from bytelatent.errors import UserError
from bytelatent.inference.decoder import Decoder
from bytelatent.inference.engine import Engine, check_batch_size
from bytelatent.inference.quantize import Weights, quantize_model
from bytelatent.inference.step.drafting import LONGEST
from bytelatent.inference.step.packed_weights import supports
from bytelatent.inference.step.prefill import FastDecoder
from bytelatent.inference.step.slots import CapturedSlots
from bytelatent.model import BLTModel, ByteLM
from bytelatent.patching import PatchSettings

QUORUM = 1 / 3  # of rows whose patches the global transformer waits for on a GPU; one of up to three rows is enough


def engine_for(
    model: BLTModel | ByteLM,
    patching: PatchSettings | None,
    byte_lm: ByteLM | None,
    num_rows: int,
    weights: Weights = "full",
    ahead: int = 1,
) -> Engine:
    """The fastest engine that can decode this model where it is.

    Args:
        weights: round the model's large matrices to `int8` or `fp8` first, see `rounded`; the byte LM stays as it is.
        ahead: bytes of a sequence that a step comes on by at most: its local models draft all but the first, the whole
            model verifies them, and the bytes are the same; 1 drafts none.

    Raises:
        UserError: this model cannot draft, or not so far; or there are no rows.
    """
    check_batch_size(num_rows)
    check_draft_length(ahead)
    device = next(model.parameters()).device.type
    if ahead > 1 and (why := _drafts_nothing(model, patching, byte_lm, device)):
        raise UserError(f"ahead: {why}; leave it out")
    model = quantize_model(model, weights)
    decides_on_host = patching is not None and patching.decides_on_host
    takes_modules = _is_changed(model) or (byte_lm is not None and _is_changed(byte_lm))
    if decides_on_host or takes_modules or not (device == "cpu" or (device == "cuda" and supports(model, byte_lm))):
        return Engine.plain(Decoder(model, patching, byte_lm), num_rows)
    decoder = (Decoder if device == "cpu" else FastDecoder)(model, patching, byte_lm)
    return Engine(decoder, CapturedSlots(decoder, num_rows, 0.0 if device == "cpu" else QUORUM, ahead=ahead), num_rows)


def _drafts_nothing(
    model: BLTModel | ByteLM, patching: PatchSettings | None, byte_lm: ByteLM | None, device: str
) -> str | None:
    """Why a model cannot draft; None if it can."""
    if isinstance(model, ByteLM) or patching is None:
        return "a byte LM has no part that drafts"
    if _is_changed(model):
        return "modules of this model were replaced, as adapters do"
    if patching.decides_on_host:
        return f"patching mode '{patching.mode}' is not drafted for"
    if device not in ("cpu", "cuda"):
        return f"nothing is drafted on {device}"
    if device == "cuda" and not supports(model, byte_lm):
        return "the kernels that draft take heads of 16, 32, 64 ... numbers"
    return None


def _is_changed(model: BLTModel | ByteLM) -> bool:
    """Whether some module is of another package, as adapters are: the fast step reads matrices and would pass it by."""
    return any(type(part).__module__.partition(".")[0] not in ("torch", "bytelatent") for part in model.modules())


def check_draft_length(ahead: int) -> None:
    """Complain about more bytes a step than there can be.

    Raises:
        UserError
    """
    if not isinstance(ahead, int) or not 1 <= ahead <= LONGEST:
        raise UserError(f"ahead: {ahead!r} bytes a step; take 1 to {LONGEST}")


__all__ = ["QUORUM", "CapturedSlots", "FastDecoder", "check_draft_length", "engine_for", "supports"]
