"""Decoding: state and caches, sampling, continuous batching; the byte LM's entropies at a GPU's speed.

Modules are imported when a name is first used, so that `inference.settings` can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bytelatent.inference.decoder import Decoder
    from bytelatent.inference.engine import (
        Continuation,
        Engine,
        check_max_new_bytes,
        check_samples,
        prompt_bytes,
        prompt_ids,
    )
    from bytelatent.inference.scoring import log_probabilities, log_probabilities_of_pairs
    from bytelatent.inference.settings import Sampling
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
_MODULES = {
    "Decoder": "decoder",
    "FastEntropies": "step.prefill",
    "Sampling": "settings",
    "log_probabilities": "scoring",
    "log_probabilities_of_pairs": "scoring",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'engine')}"), name)
