"""Byte-level language models with dynamic patches: the Byte Latent Transformer (Pagnoni et al. 2024)."""

TYPE_CHECKING = False  # as typing's, which takes longer to import than all else here
if TYPE_CHECKING:
    from typing import Any

    from bytelatent.blt import BLT, ByteLM

__version__ = "0.1.0"
__all__ = ["BLT", "ByteLM", "__version__"]


def __getattr__(name: str) -> "Any":
    """`from bytelatent import BLT` imports torch; `import bytelatent` alone stays light."""
    if name in ("BLT", "ByteLM"):
        from bytelatent import blt

        return getattr(blt, name)
    raise AttributeError(f"module 'bytelatent' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
