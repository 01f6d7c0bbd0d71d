"""Decoding at the speed of the card: one byte of every row a step, in fixed shapes, without a word from the host.

`weights` packs a model's matrices as the kernels read them, `prefill` reads prompts with them, `step` is the step,
`rows` captures it in a CUDA graph and replays it, reading what was drawn in the background.
"""

from bytelatent.inference.fast.prefill import FastDecoder
from bytelatent.inference.fast.rows import FastRows
from bytelatent.inference.fast.weights import supports

__all__ = ["FastDecoder", "FastRows", "supports"]
