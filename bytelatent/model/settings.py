"""The shapes of the models, and named ones: the demo's, the released models', the paper's."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from bytelatent.config import Settings
from bytelatent.errors import UserError, nearest
from bytelatent.vocab import VOCAB_SIZE

# What no model has: a file with more is corrupt, or made to waste a reader's time and memory.
LONGEST_CONTEXT = 2**24  # ids
LONGEST_NGRAM = 1024  # ids; one is hashed in as many steps
MOST_LAYERS = 1000  # of a stack
WIDEST = 2**20


class RopeScaling(Settings):
    """Lower frequencies of the rotary embedding, for longer texts than a model saw at first, as in Llama 3.1.

    Attributes:
        factor: what the low frequencies are divided by.
        low_freq_factor: those that turn fewer times than this within `original_context` are low.
        high_freq_factor: those that turn more often stay as they are; between the two, both are mixed.
        original_context: positions that the model saw at first.
    """

    factor: float = Field(ge=1, allow_inf_nan=False)
    low_freq_factor: float = Field(gt=0, allow_inf_nan=False)
    high_freq_factor: float = Field(gt=0, allow_inf_nan=False)
    original_context: int = Field(ge=1, le=LONGEST_CONTEXT)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor:g} must be above low_freq_factor {self.low_freq_factor:g}"
            )
        return self


class StackSettings(Settings):
    """A stack of transformer blocks. The last four settings are those of blocks of Llama, Qwen2 and Qwen3.

    Attributes:
        window: ids (itself and the window-1 before it) that attention sees; None for the whole document.
        num_kv_heads: key and value heads shared by groups of query heads; None for as many as num_heads.
        ffn_dim_multiplier, multiple_of: the feed-forward width is 2/3 * 4 * dim * ffn_dim_multiplier, rounded up.
        head_size: width of a head; None for dim / num_heads.
        attention_bias: queries, keys and values have biases.
        qk_norm: each head's queries and keys are normalized before they are rotated.
        rope_scaling: None for the plain rotary embedding.
    """

    dim: int = Field(ge=2, le=WIDEST)
    num_layers: int = Field(ge=1, le=MOST_LAYERS)
    num_heads: int = Field(ge=1, le=WIDEST)
    num_kv_heads: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=1, le=2**31)
    ffn_dim_multiplier: float = Field(default=1.0, gt=0, le=1000)
    multiple_of: int = Field(default=256, ge=1, le=WIDEST)
    rope_theta: float = Field(default=500_000.0, gt=0, allow_inf_nan=False)
    norm_eps: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    head_size: int | None = Field(default=None, ge=2, le=WIDEST, multiple_of=2)
    attention_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_size is None and (self.dim % self.num_heads or (self.dim // self.num_heads) % 2):
            raise ValueError(f"dim {self.dim} must be num_heads {self.num_heads} times an even head size")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        return self.head_size or self.dim // self.num_heads

    @property
    def attention_dim(self) -> int:
        """The width of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def hidden_dim(self) -> int:
        """Feed-forward width. Each factor is truncated in turn, as published."""
        hidden = int(int(2 * 4 * self.dim / 3) * self.ffn_dim_multiplier)
        return self.multiple_of * ((hidden + self.multiple_of - 1) // self.multiple_of)


class ByteLMSettings(StackSettings):
    """The byte LM, whose entropies say where patches begin."""

    kind: Literal["byte_lm"] = "byte_lm"

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE


class TokenLMSettings(StackSettings):
    """A language model on the ids of a tokenizer: the baseline of a BLT.

    Attributes:
        vocab_size: ids, at least as many as the tokenizer has.
    """

    kind: Literal["token_lm"] = "token_lm"
    vocab_size: int = Field(ge=VOCAB_SIZE, le=WIDEST)


LanguageModelSettings = ByteLMSettings | TokenLMSettings


class CrossAttentionSettings(Settings):
    """Attention between bytes and patches.

    Attributes:
        k: queries (in the encoder) and keys (in the decoder) per patch.
        num_kv_heads: key and value heads shared by groups of query heads; None for as many as num_heads.
        all_layers_encoder, all_layers_decoder: after (before) every layer, or only the last (first).
    """

    k: int = Field(default=2, ge=1, le=1024)
    num_heads: int = Field(ge=1)
    num_kv_heads: int | None = Field(default=None, ge=1)
    all_layers_encoder: bool = False
    all_layers_decoder: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


class NgramHashSettings(Settings):
    """Byte n-gram hash embeddings.

    Attributes:
        stop_at_document: n-grams do not reach over a document's start. In the training of the published models they
            reach over it where a row of a batch holds several documents; alone, a document has nothing before it.
    """

    sizes: list[int] = Field(default=[3, 4, 5, 6, 7, 8], min_length=1, max_length=64)
    num_functions: int = Field(default=1, ge=1, le=11)
    vocab_size: int = Field(default=500_002, ge=1, le=2**31)
    stop_at_document: bool = True

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if min(self.sizes) < 1 or max(self.sizes) > LONGEST_NGRAM:
            raise ValueError(f"n-gram sizes must be from 1 to {LONGEST_NGRAM}, not {self.sizes}")
        return self

    @property
    def num_tables(self) -> int:
        return self.num_functions * len(self.sizes)


class BLTSettings(Settings):
    """The Byte Latent Transformer, and models like it without cross-attention.

    Attributes:
        cross_attention: None: the states of a patch's last bytes, side by side, are the patch's state, and what the
            global transformer makes of it is added to states of bytes.
        joined_bytes: without cross-attention, how many bytes those are; zeros where the patch has fewer.
        added_to: without cross-attention, the bytes that a patch is added to: all that may read it, up to the one that
            closes the next patch (`readers`), or only the one that closes it (`closing`).
        ngram_hash: None: a byte's embedding is that of the byte alone.
    """

    kind: Literal["blt"] = "blt"
    encoder: StackSettings
    global_transformer: StackSettings
    decoder: StackSettings
    cross_attention: CrossAttentionSettings | None
    joined_bytes: int = Field(default=1, ge=1, le=1024)
    added_to: Literal["readers", "closing"] = "readers"
    ngram_hash: NgramHashSettings | None = NgramHashSettings()

    @property
    def states_per_patch(self) -> int:
        """States as wide as a byte's that make a patch's."""
        return self.joined_bytes if self.cross_attention is None else self.cross_attention.k

    @model_validator(mode="after")
    def _of_addition(self) -> Self:
        if self.cross_attention is not None and (self.joined_bytes, self.added_to) != (1, "readers"):
            name = "added_to" if self.joined_bytes == 1 else "joined_bytes"
            raise ValueError(f"{name} is for a model without cross-attention: cross_attention=null; leave it out")
        return self

    @model_validator(mode="after")
    def _widths_fit(self) -> Self:
        if self.encoder.dim != self.decoder.dim:
            raise ValueError(
                f"decoder.dim {self.decoder.dim} must equal encoder.dim {self.encoder.dim}: "
                "the decoder starts from the encoder's byte states"
            )
        if self.cross_attention is not None and self.encoder.dim % self.cross_attention.num_heads:
            raise ValueError(
                f"encoder.dim {self.encoder.dim} must be a multiple of "
                f"cross_attention.num_heads {self.cross_attention.num_heads}"
            )
        if self.global_transformer.window is not None:
            raise ValueError("global_transformer.window: the global transformer sees the whole document; leave it out")
        return self


ModelSettings = ByteLMSettings | TokenLMSettings | BLTSettings
NAMES = {"byte_lm": "byte LM", "token_lm": "token LM", "blt": "BLT"}  # by kind


def settings_class(values: Mapping[str, Any]) -> type[ModelSettings]:
    """The kind of model that plain values describe: as they say, else by their keys."""
    kinds: dict[Any, type[ModelSettings]] = {
        "byte_lm": ByteLMSettings,
        "token_lm": TokenLMSettings,
        "blt": BLTSettings,
    }
    if isinstance(kind := values.get("kind"), str) and kind in kinds:
        return kinds[kind]
    if "kind" in values or (BLTSettings.model_fields.keys() - ByteLMSettings.model_fields.keys()) & values.keys():
        return BLTSettings
    return TokenLMSettings if "vocab_size" in values else ByteLMSettings


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


def megabyte(blt: BLTSettings, patch_size: int) -> BLTSettings:
    """A model like MegaByte, for patches of `patch_size` ids (patching mode `static`), with the stacks of a BLT.

    As there, the bytes of a patch side by side are the patch, and the global transformer's output of the patch before
    is added to each byte's state. Here a block has read the bytes before they are joined (there they are embeddings),
    the local model's attention reaches over patches within its window (there it sees its patch alone), the global
    output is normalized before its projection, and blocks have rotary embeddings and SwiGLU.

    Source: Yu et al. 2023, MEGABYTE, section 2.
    """
    return blt.model_copy(update={"cross_attention": None, "ngram_hash": None, "joined_bytes": patch_size})


def spacebyte(blt: BLTSettings, num_layers: int) -> BLTSettings:
    """A model like SpaceByte, for patching mode `space`, with the stacks of a BLT and `num_layers` local blocks on
    either side of the global ones.

    As there, local blocks read the bytes, and global ones only BOS and the first of each run of space-like bytes, which
    in mode `space` are the bytes that close patches; their output is added to the states of these bytes, and local
    blocks read on. Here learned projections lead to the global width and back (there states are padded and cut), and
    the global output is normalized before the second one.

    Source: Slagle 2024, SpaceByte, section 3.
    """
    stack = {"num_layers": num_layers}
    update = {"encoder": blt.encoder.model_copy(update=stack), "decoder": blt.decoder.model_copy(update=stack)}
    return blt.model_copy(update={**update, "cross_attention": None, "ngram_hash": None, "added_to": "closing"})


_DEMO_BLT = BLTSettings(
    encoder=StackSettings(dim=128, num_layers=1, num_heads=4, window=64, multiple_of=64),
    global_transformer=StackSettings(dim=192, num_layers=3, num_heads=6, multiple_of=64),
    decoder=StackSettings(dim=128, num_layers=3, num_heads=4, window=64, multiple_of=64),
    cross_attention=CrossAttentionSettings(k=2, num_heads=4),
    ngram_hash=NgramHashSettings(vocab_size=32_771),
)
_BLT_100M = _blt((512, 8), (1, 12, 5), (768, 12), k=2, hash_vocab=20_011)

PRESETS: dict[str, ModelSettings] = {
    # Small enough for two CPU cores and five minutes.
    "demo-byte-lm": ByteLMSettings(dim=128, num_layers=3, num_heads=4, window=128, multiple_of=64),
    "demo-blt": _DEMO_BLT,
    # Baselines of about as many parameters as that, its hash tables apart.
    "demo-flat": ByteLMSettings(dim=192, num_layers=6, num_heads=6, multiple_of=64),
    "demo-megabyte": megabyte(_DEMO_BLT, patch_size=6),
    "demo-spacebyte": spacebyte(_DEMO_BLT, num_layers=2),
    "demo-token-lm": TokenLMSettings(dim=128, num_layers=3, num_heads=4, multiple_of=64, vocab_size=2048),
    # Ten minutes on one GPU.
    "byte-lm-10m": ByteLMSettings(dim=384, num_layers=6, num_heads=6, window=512),
    "blt-100m": _BLT_100M,
    "token-lm-100m": TokenLMSettings(dim=768, num_layers=12, num_heads=12, vocab_size=16_384),
    "flat-100m": ByteLMSettings(dim=768, num_layers=16, num_heads=12),
    "megabyte-100m": megabyte(_BLT_100M, patch_size=6),
    "spacebyte-100m": spacebyte(_BLT_100M, num_layers=3),
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
    """There is no preset with this name.

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
