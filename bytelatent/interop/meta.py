"""Meta's hub format: `config.json` (`args`), `model.safetensors`, `train_args.json`."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytelatent.interop.native import filled, read_json, read_tensors
from bytelatent.model import BLTModel, BLTSettings, ByteLM, ByteLMSettings
from bytelatent.model.settings import CrossAttentionSettings, NgramHashSettings, StackSettings
from bytelatent.patching import PatchSettings

# Published name -> ours, applied in this order to every tensor's name.
RENAMES = [
    (r"^(local_encoder|local_decoder|global_transformer)\.layers\.", r"\1.stack.blocks."),
    (r"^layers\.", "stack.blocks."),
    (r"^tok_embeddings\.", "embedding."),
    (r"^local_encoder\.tok_embeddings\.", "encoder.embedding."),
    (r"^local_encoder\.patch_embedding_projection\.", "encoder.pooled_to_queries."),
    (r"^local_decoder\.patch_embedding_projection\.", "decoder.patch_to_keys."),
    (r"^global_transformer\.token_embedding_projection\.", "global_transformer.projection."),
    (r"^local_(encoder|decoder)\.", r"\1."),
    (r"\.cross_attn_layers\.", ".cross_attention."),
    (r"\.cross_attn_norm_q\.", ".query_norm."),
    (r"\.cross_attn_norm_kv\.", ".key_value_norm."),
    (r"\.ffn_norm\.", ".feed_forward_norm."),
    (r"\.wq\.", ".query."),
    (r"\.wk\.", ".key."),
    (r"\.wv\.", ".value."),
    (r"\.wo\.", ".output."),
    (r"\.w1\.", ".gate."),
    (r"\.w2\.", ".down."),
    (r"\.w3\.", ".up."),
]
HASH_TABLE = re.compile(r"^encoder_hash_tok_embedding\.(\d+)\.weight$")


def is_meta(folder: Path) -> bool:
    """Whether `folder` is in Meta's hub format."""
    config = folder / "config.json"
    return config.is_file() and "args" in read_json(config)


def is_byte_lm(folder: Path) -> bool:
    return "n_layers_local_encoder" not in read_json(folder / "config.json")["args"]


def load_byte_lm(folder: Path) -> ByteLM:
    """The entropy model of a release."""
    args = read_json(folder / "config.json")["args"]
    settings = ByteLMSettings(
        dim=args["dim"],
        num_layers=args["n_layers"],
        num_heads=args["n_heads"],
        num_kv_heads=args.get("n_kv_heads"),
        window=args.get("sliding_window"),
        **_shared(args),
    )
    return filled(ByteLM, settings, _tensors(folder), str(folder))


def load_blt(folder: Path) -> tuple[BLTModel, PatchSettings]:
    """A released BLT and the patching rule it was trained with."""
    args = read_json(folder / "config.json")["args"]
    window = args["local_attention_window_len"]
    shared = _shared(args)
    settings = BLTSettings(
        encoder=StackSettings(
            dim=args["dim_local_encoder"],
            num_layers=args["n_layers_local_encoder"],
            num_heads=args["n_heads_local_encoder"],
            window=window,
            **shared,
        ),
        global_transformer=StackSettings(
            dim=args["dim_global"],
            num_layers=args["n_layers_global"],
            num_heads=args["n_heads_global"],
            num_kv_heads=args.get("n_kv_heads_global"),
            **shared,
        ),
        decoder=StackSettings(
            dim=args["dim_local_decoder"],
            num_layers=args["n_layers_local_decoder"],
            num_heads=args["n_heads_local_decoder"],
            window=window,
            **shared,
        ),
        cross_attention=CrossAttentionSettings(
            k=args["cross_attn_k"],
            num_heads=args["cross_attn_nheads"],
            all_layers_encoder=args["cross_attn_all_layers_encoder"],
            all_layers_decoder=args["cross_attn_all_layers_decoder"],
        ),
        ngram_hash=NgramHashSettings(
            sizes=args["encoder_hash_byte_group_size"],
            num_functions=args["encoder_hash_byte_group_nb_functions"],
            vocab_size=args["encoder_hash_byte_group_vocab"],
            stop_at_document=False,
        ),
    )
    return filled(BLTModel, settings, _tensors(folder), str(folder)), _patching(folder, args)


def _shared(args: dict[str, Any]) -> dict[str, Any]:
    return {
        "ffn_dim_multiplier": args.get("ffn_dim_multiplier") or 1.0,
        "multiple_of": args["multiple_of"],
        "rope_theta": args["rope_theta"],
        "norm_eps": args["norm_eps"],
    }


def _patching(folder: Path, args: dict[str, Any]) -> PatchSettings:
    """The rule from `train_args.json`, which knows the threshold; `config.json` often does not."""
    path = folder / "train_args.json"
    patcher = read_json(path)["data"]["patcher_args"] if path.is_file() else {}
    mode = patcher.get("patching_mode", args.get("patching_mode"))
    values = {"mode": mode, "max_patch_length": patcher.get("max_patch_length", args.get("max_patch_length"))}
    if mode == "entropy":
        values["threshold"] = patcher.get("threshold", args.get("patching_threshold"))
        values["threshold_add"] = patcher.get("threshold_add", args.get("patching_threshold_add"))
        values["monotonicity"] = patcher.get("monotonicity", args.get("monotonicity")) or False
    if mode == "static":
        values["patch_size"] = int(patcher.get("patch_size") or args["patch_size"])
    return PatchSettings.parse(values, where=str(folder))


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors under our names."""
    published = read_tensors(folder / "model.safetensors")
    tables = {int(match[1]): published.pop(name) for name in list(published) if (match := HASH_TABLE.match(name))}
    tensors = {}
    for name, tensor in published.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor
    if tables:
        tensors["encoder.ngram_hash.tables.weight"] = torch.cat([tables[i] for i in sorted(tables)])
    return tensors
