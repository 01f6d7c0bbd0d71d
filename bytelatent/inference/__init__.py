"""Decoding: state and caches, sampling, continuous batching; the byte LM's entropies at a GPU's speed."""

import torch
from torch import Tensor

from bytelatent.inference.decode import Decoder
from bytelatent.inference.engine import Continuation, Engine
from bytelatent.inference.fast_entropies import FastEntropies
from bytelatent.inference.sampling import Sampling
from bytelatent.inference.scoring import log_probabilities, log_probabilities_of_pairs
from bytelatent.vocab import encode


def prompt_ids(text: str | bytes) -> Tensor:
    """BOS and the bytes of a prompt, [N]."""
    return torch.from_numpy(encode(text, eos=False))


__all__ = [
    "Continuation",
    "Decoder",
    "Engine",
    "FastEntropies",
    "Sampling",
    "log_probabilities",
    "log_probabilities_of_pairs",
    "prompt_ids",
]
