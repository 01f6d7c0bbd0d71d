"""Decoding: KV caches, sampling, continuous batching, scoring; at a GPU's speed in `step`.

Modules are imported when a name is first used, so that `inference.settings` can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bytelatent.inference.continuation import Continuation
    from bytelatent.inference.decoder import Decoder
    from bytelatent.inference.engine import Engine, prompt_bytes, prompt_ids
    from bytelatent.inference.scoring import FastEntropies, log_probabilities, log_probabilities_of_pairs
    from bytelatent.inference.settings import Sampling

__all__ = [
    "Continuation",
    "Decoder",
    "Engine",
    "FastEntropies",
    "Sampling",
    "log_probabilities",
    "log_probabilities_of_pairs",
    "prompt_bytes",
    "prompt_ids",
]
_MODULES = {
    "continuation": ["Continuation"],
    "decoder": ["Decoder"],
    "engine": ["Engine", "prompt_bytes", "prompt_ids"],
    "scoring": ["FastEntropies", "log_probabilities", "log_probabilities_of_pairs"],
    "settings": ["Sampling"],
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
