"""A BLT around the blocks of a token LM: they become its global transformer, and all else is new.

The blocks are taken as they are, tensor by tensor. The token LM's embedding and output are left out: the local models
take their place. Two things about them are kept in the new weights. Patches come in as large as token embeddings were,
for what a block adds is small or large beside its input. And the norm before the output is a factor of the decoder's
projection of patches, which leads to a norm anyway.

Source: Pagnoni et al. 2024, section 6.2 ("byte-ifying" Llama 3.1) and table 5.
"""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bytelatent.errors import UserError
from bytelatent.model import BLTSettings, TokenLMSettings, add_patches, build_model, pack_rows
from bytelatent.model.block import init_weights
from bytelatent.model.blt import LocalEncoder
from bytelatent.model.settings import NAMES, CrossAttentionSettings, NgramHashSettings, StackSettings
from bytelatent.vocab import BOS, VOCAB_SIZE
from bytelatent.weights.safetensors_io import CHUNK_BYTES, DrawnRange, StoredTensor
from bytelatent.weights.stored_model import Config, Origin, StoredModel

BLOCKS = "stack.blocks."
LOCAL_HEADS = (64, 32, 16, 8, 4, 2)  # sizes, the first that divides the width
MOST_HASH_ROWS = 500_002  # of a table, as the paper's models have


def byteify(
    source: StoredModel,
    config: Config,
    byte_lm: StoredModel | None = None,
    seed: int = 0,
) -> StoredModel:
    """The BLT that `config` describes, with the blocks of a token LM as its global transformer.

    Args:
        source: the token LM.
        config: its model's global transformer has the shape of the token LM; see `blt_around`.
        byte_lm: the entropy model, where the patching mode needs one.
        seed: of the new weights.
    """
    model = config.model
    assert isinstance(model, BLTSettings)
    blocks = {name: tensor for name, tensor in source.tensors.items() if name.startswith(BLOCKS)}
    dtype = blocks[f"{BLOCKS}0.attention.query.weight"].dtype
    tensors = {f"global_transformer.{name}": tensor for name, tensor in blocks.items()}
    for name, weight in _new_weights(model, seed, _scale(source, model, seed), source.tensors["norm.weight"].load()):
        tensors[name] = StoredTensor.of(weight.to(dtype))
    if model.ngram_hash is not None:
        tensors["encoder.ngram_hash.tables.weight"] = _tables(model.ngram_hash, model.encoder.dim, dtype, seed)
    return replace(
        source,
        config=config.model_copy(update={"origin": Origin(licence=source.config.origin.licence)}),
        tensors=tensors,
        byte_lm=byte_lm,
        format=f"{source.format}, byteified",
        tokenizer=None,
        chat_template=None,
    )


def blt_around(
    source: StoredModel,
    local_dim: int | None = None,
    encoder_layers: int = 1,
    decoder_layers: int | None = None,
    hash_rows: int | None = None,
) -> BLTSettings:
    """The shape of a BLT whose global transformer is a token LM's.

    Args:
        local_dim: width of the local models. None: near to that of the paper's model with such a global transformer.
        decoder_layers: None: a quarter of the token LM's, at most nine.
        hash_rows: rows of each table of n-gram hashes; 0 for no tables. None: as many as give all tables together as
            many weights as the blocks have, at most the paper's.

    Raises:
        UserError: it is no token LM, or its attention has a window.
    """
    model = source.config.model
    if not isinstance(model, TokenLMSettings):
        raise UserError(f"source: '{source.source}' holds a {NAMES[model.kind]}; name a token LM: a Llama or a Qwen")
    if model.window is not None:
        raise UserError(
            f"source: '{source.source}' sees a window of {model.window} tokens, and a global transformer the whole "
            "document; name a model without sliding_window"
        )
    stack = StackSettings(**{name: getattr(model, name) for name in StackSettings.model_fields})
    dim = local_dim or _local_width(model.dim)
    heads = dim // next(size for size in LOCAL_HEADS if dim % size == 0)
    local = {"dim": dim, "num_heads": heads, "window": 512, "norm_eps": model.norm_eps}
    decoder_layers = decoder_layers or min(max(round(model.num_layers / 4), 1), 9)
    sizes = NgramHashSettings().sizes
    if hash_rows is None:
        weights = sum(math.prod(tensor.shape) for name, tensor in source.tensors.items() if name.startswith(BLOCKS))
        hash_rows = min(max(weights // (len(sizes) * dim), 1), MOST_HASH_ROWS)
    return BLTSettings(
        encoder=StackSettings(**local, num_layers=encoder_layers),
        global_transformer=stack,
        decoder=StackSettings(**local, num_layers=decoder_layers),
        cross_attention=CrossAttentionSettings(k=-(-model.dim // dim), num_heads=heads),
        ngram_hash=NgramHashSettings(vocab_size=hash_rows) if hash_rows else None,
    )


def _local_width(width: int) -> int:
    """The width of the local models for that of a global transformer: in the paper 768 for 1280, 1024 for 2048, 1280
    for 4096. It grows about as the square root does.
    """
    if width < 256:
        return width
    return min(256 * max(round(21.5 * width**0.5 / 256), 1), width // 2 * 2)


def _new_weights(model: BLTSettings, seed: int, scale: float, norm_G: Tensor) -> list[tuple[str, Tensor]]:
    """All weights but those of the blocks and of the hash tables.

    Args:
        scale: of the patches' states beside those that `init_weights` gives.
        norm_G: the weights of the token LM's last norm.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        whole = build_model(model)
    found: list[tuple[str, Tensor]] = []
    for prefix, part in whole.named_modules():
        names = [name for name, _ in part.named_parameters(recurse=False)]
        if not names or prefix.startswith("global_transformer.stack") or isinstance(part, nn.EmbeddingBag):
            continue
        part.to_empty(device="cpu", recurse=False)
        init_weights(part, generator)
        for name in names:
            weight = part.get_parameter(name).detach()
            if prefix == "encoder.pooled_to_queries" or prefix.startswith("encoder.cross_attention.0.output"):
                weight = weight * scale  # the states are linear in both
            if prefix == "decoder.patch_to_keys":
                weight = weight * norm_G.float()
            found.append((f"{prefix}.{name}", weight))
    return found


def _scale(source: StoredModel, model: BLTSettings, seed: int) -> float:
    """How much larger the token LM's embeddings are than the patches' states with fresh weights."""
    squares, embedding = 0.0, source.tensors["embedding.weight"]
    for chunk in embedding.chunks():
        squares += float(torch.from_numpy(chunk).view(embedding.dtype).float().square().sum())
    return math.sqrt(squares / math.prod(embedding.shape)) / _size_of_patches(model, seed)


@torch.no_grad()
def _size_of_patches(model: BLTSettings, seed: int) -> float:
    """The root mean square of patches' states with fresh weights, measured on random ids in patches of four."""
    hashes = model.ngram_hash and model.ngram_hash.model_copy(update={"vocab_size": 997})
    generator = torch.Generator().manual_seed(seed)
    encoder = LocalEncoder(model.model_copy(update={"ngram_hash": hashes}))
    init_weights(encoder, generator)
    ids = torch.randint(0, VOCAB_SIZE, [512], generator=generator)
    ids[0] = BOS
    stream = add_patches(pack_rows([ids]), torch.arange(1, 513) % 4 == 0)
    return float(encoder(stream)[1].square().mean().sqrt())


def _tables(hashes: NgramHashSettings, dim: int, dtype: torch.dtype, seed: int) -> StoredTensor:
    """Fresh hash tables, drawn piece by piece as they are written."""
    rows = hashes.num_tables * hashes.vocab_size
    at_once = max(CHUNK_BYTES // 4 // dim, 1)
    sizes = [min(at_once, rows - begin) for begin in range(0, rows, at_once)]
    pieces = [
        DrawnRange(partial(_drawn_rows, size, dim, dtype, (seed << 20) + number + 1), size * dim * dtype.itemsize)
        for number, size in enumerate(sizes)
    ]
    return StoredTensor(dtype, (rows, dim), tuple(pieces))


def _drawn_rows(rows: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    table = nn.EmbeddingBag.from_pretrained(torch.empty(rows, dim))
    init_weights(table, torch.Generator().manual_seed(seed))
    return table.weight.to(dtype)
