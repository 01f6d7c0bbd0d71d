"""Decoding: state and caches, sampling, continuous batching; the byte LM's entropies at a GPU's speed."""

from bytelatent.inference.decoder import Decoder
from bytelatent.inference.engine import (
    Continuation,
    Engine,
    check_max_new_bytes,
    check_samples,
    prompt_bytes,
    prompt_ids,
)
from bytelatent.inference.sampling import Sampling
from bytelatent.inference.scoring import log_probabilities, log_probabilities_of_pairs
from bytelatent.inference.step.prefill import FastEntropies

__all__ = [
    "Continuation",
    "Decoder",
    "Engine",
    "FastEntropies",
    "Sampling",
    "check_max_new_bytes",
    "check_samples",
    "log_probabilities",
    "log_probabilities_of_pairs",
    "prompt_bytes",
    "prompt_ids",
]
