"""Makes `lm_eval --model bytelatent` known to lm-evaluation-harness.

lm_eval 0.4.13 finds no models of other packages by itself. torch calls the entry points of the group `torch.backends`
when it is imported, which every command of lm_eval does before it looks for its model; `register` is one of them.
Without lm_eval it does nothing. Where torch is imported first, or its switch TORCH_DEVICE_BACKEND_AUTOLOAD is 0, import
`bytelatent.evaluation.harness`.
"""

import sys
from contextlib import suppress

NAME = "bytelatent"


def register() -> None:
    """Add the model to lm_eval's registry, by its place; an error here would keep torch from being imported."""
    if "lm_eval" not in sys.modules:
        return
    with suppress(Exception):
        import lm_eval.models  # noqa: F401  # pyright: ignore[reportMissingImports]  # its own models come first
        from lm_eval.api.registry import model_registry  # pyright: ignore[reportMissingImports]

        if NAME not in model_registry:
            model_registry.register(NAME, target="bytelatent.evaluation.harness:HarnessModel")
