"""Meta's formats.

The hub's: `config.json` (`args`), `model.safetensors`, `train_args.json`. The older one: `params.json` (all settings of
the training), `consolidated.pth`. The entropy model is a folder of its own, in either format.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bytelatent.errors import UserError
from bytelatent.model import BLTSettings, ModelSettings
from bytelatent.weights.beside import recall, remember
from bytelatent.weights.meta_args import args_of, is_byte_lm, patcher_args_of, refuse_what_is_not_known, settings_of
from bytelatent.weights.safetensors_io import (
    StoredTensor,
    read_json,
    read_pickle,
    read_weights,
    shown,
    write_json,
    write_weights,
)
from bytelatent.weights.stored_model import Config, StoredModel, shapes, under_our_names, under_their_names

BYTE_LM = "blt-entropy"  # where we write it; Meta's own repository is called so
BYTE_LM_FOLDERS = (BYTE_LM, "entropy_model", "blt_entropy")
PUBLISHED_CONTEXT = 8192
PUBLISHED_WINDOW = 512  # of the entropy model, where an older file does not say it

BLOCK = {
    "attention_norm": "attention_norm",
    "attention.query": "attention.wq",
    "attention.key": "attention.wk",
    "attention.value": "attention.wv",
    "attention.output": "attention.wo",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate": "feed_forward.w1",
    "feed_forward.down": "feed_forward.w2",
    "feed_forward.up": "feed_forward.w3",
}
CROSS_ATTENTION = {
    "query_norm": "cross_attn_norm_q",
    "key_value_norm": "cross_attn_norm_kv",
    "query": "wq",
    "key": "wk",
    "value": "wv",
    "output": "wo",
}
PLACES = [  # ours, theirs, what stands there by number
    ("encoder.stack.blocks.", "local_encoder.layers.", BLOCK),
    ("encoder.cross_attention.", "local_encoder.cross_attn_layers.", CROSS_ATTENTION),
    ("global_transformer.stack.blocks.", "global_transformer.layers.", BLOCK),
    ("decoder.stack.blocks.", "local_decoder.layers.", BLOCK),
    ("decoder.cross_attention.", "local_decoder.cross_attn_layers.", CROSS_ATTENTION),
    ("stack.blocks.", "layers.", BLOCK),
]
ALONE = {
    "embedding": "tok_embeddings",
    "norm": "norm",
    "output": "output",
    "encoder.embedding": "local_encoder.tok_embeddings",
    "encoder.pooled_to_queries": "local_encoder.patch_embedding_projection",
    "global_transformer.projection": "global_transformer.token_embedding_projection",
    "decoder.patch_to_keys": "local_decoder.patch_embedding_projection",
    "decoder.norm": "local_decoder.norm",
    "decoder.output": "local_decoder.output",
}
HASH_TABLES = "encoder.ngram_hash.tables"


def is_meta(folder: Path) -> bool:
    """Whether `folder` is in one of Meta's formats."""
    config = folder / "config.json"
    return (config.is_file() and "args" in read_json(config)) or (folder / "params.json").is_file()


def open_meta(folder: Path, weights: bool = True) -> StoredModel:
    """A released BLT with the patching rule it was trained with, or a released entropy model.

    Raises:
        UserError: something is missing, or changes the mathematics to what is not known here.
    """
    args, patcher, words = _read_settings(folder)
    try:
        model, patching = settings_of(args, patcher, str(folder))
    except KeyError as error:
        raise UserError(f"'{folder}': its JSON files lack the key {error}; fetch them again") from None
    warnings = refuse_what_is_not_known(args, folder)
    config = Config(model=model, context=PUBLISHED_CONTEXT, patching=patching)
    config = recall(
        folder, config, lambda earlier: (*settings_of(args_of(earlier), patcher_args_of(earlier)), PUBLISHED_CONTEXT)
    )
    tensors: Mapping[str, StoredTensor] = {}
    if weights:
        tensors = under_our_names(_read_tensors(folder), config.model, published_names, str(folder))
    byte_lm = None
    if not is_byte_lm(args):
        inner = next((folder / name for name in BYTE_LM_FOLDERS if is_meta(folder / name)), None)
        byte_lm = open_meta(inner, weights) if inner is not None else None
    return StoredModel(config, tensors, byte_lm, words, str(folder), warnings)


def write_meta(folder: Path, stored: StoredModel, advance: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Write a model in the hub's format into an existing folder; its byte LM goes into `blt-entropy/`.

    Raises:
        UserError: the format has no room for one of its settings.
    """
    config = stored.config
    args, patcher = args_of(config), patcher_args_of(config)
    write_json(folder / "config.json", {"args": args})
    if patcher is not None:
        data = {"patcher_args": patcher, "tokenizer_args": {"name": "blt"}}
        write_json(folder / "train_args.json", {"model": args, "data": data})
    remember(folder, config)
    # Published code reads one file; it knows nothing of shards.
    tensors = under_their_names(stored.tensors, published_names(config.model))
    write_weights(folder, tensors, shard_bytes=None, advance=advance)
    if stored.byte_lm is not None:
        (folder / BYTE_LM).mkdir()
        write_meta(folder / BYTE_LM, stored.byte_lm, advance)


def published_names(settings: ModelSettings) -> dict[str, list[str]]:
    """For each of our tensors the published ones it is made of."""
    return {name: _published(name, settings) for name in shapes(settings)}


def _published(name: str, settings: ModelSettings) -> list[str]:
    path, _, kind = name.rpartition(".")
    if path == HASH_TABLES:
        assert isinstance(settings, BLTSettings)
        assert settings.ngram_hash is not None
        return [f"encoder_hash_tok_embedding.{i}.{kind}" for i in range(settings.ngram_hash.num_tables)]
    for ours, theirs, inside in PLACES:
        if path.startswith(ours):
            number, _, rest = path.removeprefix(ours).partition(".")
            return [f"{theirs}{number}.{inside[rest]}.{kind}"]
    return [f"{ALONE[path]}.{kind}"]


def _read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The model's arguments, the patcher's, and the format in words."""
    config, params = folder / "config.json", folder / "params.json"
    if config.is_file() and "args" in read_json(config):
        train_args = folder / "train_args.json"
        args, patcher = _group(config, read_json(config), "args"), {}
        if train_args.is_file() and not is_byte_lm(args):
            patcher = _group(train_args, _group(train_args, read_json(train_args), "data"), "patcher_args")
        return args, patcher, "Meta's hub format"
    values = read_json(params)
    args = next(
        (values[key] for key in ("model", "entropy_model", "args") if isinstance(values.get(key), dict)), values
    )
    data = _group(params, values, "data") if values.get("data") is not None else {}
    patcher = _group(params, data, "patcher_args") if data.get("patcher_args") is not None else {}
    if is_byte_lm(args):
        args = {"sliding_window": PUBLISHED_WINDOW, **args}
    return args, patcher, "Meta's older format"


def _group(file: Path, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The keys and values that a JSON file holds under a key."""
    if key not in values:
        raise UserError(f"'{file}' lacks the key '{key}'; fetch it again")
    if not isinstance(values[key], dict):
        raise UserError(f"'{file}': {key} is {shown(repr(values[key]))}; it should be a mapping of keys to values")
    return values[key]


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    hub = ("model.safetensors", "model.safetensors.index.json")
    if any((folder / name).is_file() for name in hub) or not (folder / "params.json").is_file():
        return read_weights(folder)
    if (folder / "consolidated.safetensors").is_file():
        return read_weights(folder, stem="consolidated")
    return read_pickle(folder / "consolidated.pth")
