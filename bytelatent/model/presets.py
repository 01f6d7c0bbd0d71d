"""Named shapes: the demo's, the released models', the paper's."""

from bytelatent.errors import UserError, nearest
from bytelatent.model.settings import (
    BLTSettings,
    ByteLMSettings,
    CrossAttentionSettings,
    ModelSettings,
    NgramHashSettings,
    StackSettings,
)


def _blt(
    local: tuple[int, int], layers: tuple[int, int, int], global_: tuple[int, int], k: int, hash_vocab: int = 500_002
) -> BLTSettings:
    """A BLT from (local width, heads), (encoder, global, decoder layers), (global width, heads) and k."""
    (dim_local, local_heads), (dim_global, global_heads) = local, global_
    encoder, middle, decoder = layers
    return BLTSettings(
        encoder=StackSettings(dim=dim_local, num_layers=encoder, num_heads=local_heads, window=512),
        global_transformer=StackSettings(dim=dim_global, num_layers=middle, num_heads=global_heads),
        decoder=StackSettings(dim=dim_local, num_layers=decoder, num_heads=local_heads, window=512),
        cross_attention=CrossAttentionSettings(k=k, num_heads=local_heads),
        ngram_hash=NgramHashSettings(vocab_size=hash_vocab),
    )


PRESETS: dict[str, ModelSettings] = {
    # Small enough for two CPU cores and five minutes.
    "demo-byte-lm": ByteLMSettings(dim=128, num_layers=3, num_heads=4, window=128, multiple_of=64),
    "demo-blt": BLTSettings(
        encoder=StackSettings(dim=128, num_layers=1, num_heads=4, window=64, multiple_of=64),
        global_transformer=StackSettings(dim=192, num_layers=3, num_heads=6, multiple_of=64),
        decoder=StackSettings(dim=128, num_layers=3, num_heads=4, window=64, multiple_of=64),
        cross_attention=CrossAttentionSettings(k=2, num_heads=4),
        ngram_hash=NgramHashSettings(vocab_size=8_191),
    ),
    # Ten minutes on one GPU.
    "byte-lm-10m": ByteLMSettings(dim=384, num_layers=6, num_heads=6, window=512),
    "blt-100m": _blt((512, 8), (1, 12, 5), (768, 12), k=2, hash_vocab=20_011),
    # The entropy model of the paper and the releases: 14 x 768, window 512.
    "entropy": ByteLMSettings(dim=768, num_layers=14, num_heads=12, window=512, rope_theta=10_000.0),
    # The sizes of Pagnoni et al. 2024. Cross-attention has as many heads as the local models, so that they divide it.
    "blt-400m": _blt((768, 12), (1, 24, 7), (1280, 10), k=2),
    "blt-1b": _blt((1024, 16), (1, 25, 9), (2048, 16), k=2),
    "blt-2b": _blt((1024, 16), (1, 26, 9), (2560, 20), k=3),
    "blt-4b": _blt((1024, 16), (1, 36, 9), (3072, 24), k=3),
    "blt-8b": _blt((1280, 20), (1, 32, 6), (4096, 32), k=4),
}


class UnknownPreset(UserError):
    """No preset has a name.

    Attributes:
        reason: the message without the setting's name.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"model: {reason}")
        self.reason = reason


def preset(name: str) -> ModelSettings:
    """The settings called `name`."""
    if name not in PRESETS:
        known = list(PRESETS)
        raise UnknownPreset(f"no preset '{name}'{nearest(name, known) or '.'} Presets: {', '.join(known)}")
    return PRESETS[name]
