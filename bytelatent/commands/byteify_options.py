"""Settings of `blt byteify`. Nothing here imports torch, so that help is shown at once."""

from typing import Annotated, Literal

from pydantic import Field

from bytelatent.commands.options import Folder
from bytelatent.config import ARGUMENT, Settings


class ByteifySettings(Settings):
    """Make a byte model of a Llama, Mistral or Qwen: a BLT whose global transformer has its blocks.

    Example:  `blt byteify meta-llama/Llama-3.2-1B --out llama-bytes`

    All else is new, so train it before use, the blocks at a tenth of the rate:
    `blt train init=llama-bytes optimizer.lr_scale.global_transformer=0.1 ...`

    Attributes:
        source: a folder or OWNER/NAME on the hub with a Llama, Mistral, Qwen2 or Qwen3, or a token LM of ours.
        out: folder to write.
        entropy_model: a byte LM, or a BLT, whose patching settings are taken too. Default: patches at spaces.
        patching: patching mode: entropy, space, static or byte. Default: that of the entropy model, or space.
        threshold: threshold of the patches, in nats (entropy).
        patch_size: bytes in a patch (static).
        local_dim: width of the local models. Default: as the paper has it for such a model.
        encoder_layers: layers of the local encoder.
        decoder_layers: layers of the local decoder. Default: a quarter of the source's, at most 9.
        hash_rows: rows of each n-gram hash table, 0 for no tables. Default: all tables together are as large as the
            blocks, but no larger than the paper's.
        context: bytes of a document that are read at once in training.
        seed: seed of the new weights.
        revision: branch, tag or commit of a repository.
        licence: licence to state on the model card. Default: the licence of the source.
    """

    source: Annotated[str, ARGUMENT]
    out: Folder
    entropy_model: str | None = None
    patching: Literal["entropy", "space", "static", "byte"] | None = None
    threshold: Annotated[float | None, Field(allow_inf_nan=False)] = None
    patch_size: int | None = Field(default=None, ge=1, le=2**31)
    local_dim: int | None = Field(default=None, ge=2, le=2**20, multiple_of=2)
    encoder_layers: int = Field(default=1, ge=1, le=1000)
    decoder_layers: int | None = Field(default=None, ge=1, le=1000)
    hash_rows: int | None = Field(default=None, ge=0, le=2**31)
    context: int = Field(default=8192, ge=1, le=2**24)
    seed: int = Field(default=0, ge=0, lt=2**40)
    revision: str | None = None
    licence: str | None = None
