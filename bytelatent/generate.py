"""Text from any model, as it comes."""

from collections.abc import Iterator
from typing import Any

import torch

from bytelatent.device import choose_device
from bytelatent.errors import UserError
from bytelatent.inference import Sampling, generate_ids
from bytelatent.interop import load
from bytelatent.vocab import decode, encode, to_bytes


def continuation(model: str, prompt: str | bytes, max_new_bytes: int, device: str, **sampling: Any) -> Iterator[bytes]:
    """The prompt, then byte after byte of what a BLT or a byte LM adds to it.

    Raises:
        UserError: the model is not there.
    """
    found = load(model)
    place = choose_device(device)
    byte_lm = found.byte_lm.to(place) if found.byte_lm is not None else None
    patching = found.config.patching
    if patching is not None and patching.needs_entropies and byte_lm is None:
        raise UserError(f"generate: the patches of '{model}' need a byte LM, which is not there")
    rows = [torch.from_numpy(encode(prompt, eos=False))]
    rule = Sampling.parse(sampling, where="generate")
    yield to_bytes(prompt)
    for drawn in generate_ids(found.model.to(place), patching, byte_lm, rows, max_new_bytes, rule):
        yield decode([i for i in drawn if i is not None])
