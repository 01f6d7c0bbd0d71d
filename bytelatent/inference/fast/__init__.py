"""Decoding at the speed of the card: one byte of every row a step, in fixed shapes, without a word from the host.

`weights` packs a model's matrices as the kernels read them, `prefill` reads prompts with them, `step` is the step,
`rows` captures it in a CUDA graph and replays it, reading what was drawn in the background.
"""

from bytelatent.inference.decode import Decoder
from bytelatent.inference.engine import Engine
from bytelatent.inference.fast.prefill import FastDecoder
from bytelatent.inference.fast.rows import FastRows
from bytelatent.inference.fast.weights import supports
from bytelatent.inference.rounded import Weights, rounded
from bytelatent.model import BLTModel, ByteLM
from bytelatent.patching import PatchSettings


def engine_for(
    model: BLTModel | ByteLM,
    patching: PatchSettings | None,
    byte_lm: ByteLM | None,
    num_rows: int,
    weights: Weights = "full",
) -> Engine:
    """The fastest engine that can decode this model where it is.

    Args:
        weights: round the model's large matrices to `int8` or `fp8` first, see `rounded`; the byte LM stays as it is.
    """
    model = rounded(model, weights)
    if patching is not None and patching.mode == "bpe":  # decided by a tokenizer, on the host
        return Engine.plain(Decoder(model, patching, byte_lm), num_rows)
    if next(model.parameters()).device.type != "cuda":
        decoder = Decoder(model, patching, byte_lm)
        return Engine(decoder, FastRows(decoder, num_rows), num_rows)
    if not supports(model, byte_lm):
        return Engine.plain(Decoder(model, patching, byte_lm), num_rows)
    decoder = FastDecoder(model, patching, byte_lm)
    return Engine(decoder, FastRows(decoder, num_rows), num_rows)


__all__ = ["FastDecoder", "FastRows", "engine_for", "supports"]
