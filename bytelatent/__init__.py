"""Byte-level language models with dynamic patches: the Byte Latent Transformer (Pagnoni et al. 2024)."""

TYPE_CHECKING = False  # as typing's, which takes longer to import than all else here
if TYPE_CHECKING:
    from typing import Any

    from bytelatent.blt import BLT

__version__ = "0.1.0"
__all__ = ["BLT", "__version__"]


def __getattr__(name: str) -> "Any":
    """`from bytelatent import BLT` imports torch; `import bytelatent` alone stays light."""
    if name == "BLT":
        from bytelatent.blt import BLT

        return BLT
    raise AttributeError(f"module 'bytelatent' has no attribute '{name}'")
