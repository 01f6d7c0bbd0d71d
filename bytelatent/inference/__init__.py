"""Decoding: KV caches, sampling, continuous batching, scoring; at a GPU's speed in `step`.

Modules are imported when a name is first used, so that `inference.settings` can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bytelatent.inference.decoder import Decoder
    from bytelatent.inference.engine import Continuation, Engine, prompt_bytes, prompt_ids
    from bytelatent.inference.scoring import FastEntropies, log_probabilities, log_probabilities_of_pairs
    from bytelatent.inference.settings import Sampling

_MODULES = {
    "Continuation": "engine",
    "Decoder": "decoder",
    "Engine": "engine",
    "FastEntropies": "scoring",
    "Sampling": "settings",
    "log_probabilities": "scoring",
    "log_probabilities_of_pairs": "scoring",
    "prompt_bytes": "engine",
    "prompt_ids": "engine",
}
__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
