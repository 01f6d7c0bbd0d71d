"""The format of `BltForCausalLM` in Hugging Face transformers: `config.json`, `model.safetensors` (or shards), a
tokenizer. Its patcher is the byte LM.

Models for which transformers computes something else than the published model are refused by name: those with encoder
cross-attention after each of several layers (transformers pools again at each and keeps only the last), and those with
other patching than the plain entropy mode and `byte`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bytelatent.errors import UserError
from bytelatent.model import BLTSettings, ByteLMSettings
from bytelatent.patching import PatchSettings
from bytelatent.vocab import BOE, BOS, EOS, VOCAB_SIZE
from bytelatent.weights.native import (
    LOADING,
    TRANSFORMERS_NAMES,
    SettingsTable,
    WeightsFormat,
    nested,
    our_settings,
    their_settings,
)
from bytelatent.weights.safetensors_io import StoredTensor, read_json_object, read_weights, write_json_object
from bytelatent.weights.side_files import read_sidecar, write_sidecar, write_tokenizer
from bytelatent.weights.stored_model import Config, StoredModel
from bytelatent.weights.transformers_config import SIZES, STACK, ConfigPart, fixed_of_stack

BYTE_LM_SIDECAR = "bytelatent.byte_lm.json"
PATCHER = "model.patcher."
NO_TABLES = "model.encoder_hash_tok_embedding.weight"  # empty in a model without n-gram hashes
MODES = ("entropy", "byte")
SPECIAL_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": BOE}

PARTS = {"encoder_config": "encoder", "global_config": "global_transformer", "decoder_config": "decoder"}
LOCAL = ("encoder_config", "decoder_config")
BLT_KEYS: SettingsTable = {
    "cross_attn_k": ("cross_attention.k",),
    "local_attention_window_len": ("encoder.window", "decoder.window"),
    **{f"{part}.{key}": (f"{stack}.{ours}",) for part, stack in PARTS.items() for key, ours in STACK.items()},
    # A cross-attention has as many heads as its part; here both cross-attentions have the same.
    **{
        f"{part}.{key}": (f"{PARTS[part]}.{ours}", f"cross_attention.{ours}")
        for part in LOCAL
        for key, ours in (("num_attention_heads", "num_heads"), ("num_key_value_heads", "kv_heads"))
    },
    **{f"{part}.cross_attn_k": ("cross_attention.k",) for part in LOCAL},
    **{f"{part}.cross_attn_all_layers": (f"cross_attention.all_layers_{PARTS[part]}",) for part in LOCAL},
    "decoder_config.hidden_size_global": ("global_transformer.dim",),
}
HASH_KEYS: SettingsTable = {
    "encoder_hash_byte_group_size": ("ngram_hash.sizes",),
    "encoder_hash_byte_group_nb_functions": ("ngram_hash.num_functions",),
    "encoder_hash_byte_group_vocab": ("ngram_hash.vocab_size",),
}
NO_HASHES = dict(zip(HASH_KEYS, ([3], 0, 1), strict=True))
PATCHER_KEYS: SettingsTable = {**{key: (ours,) for key, ours in STACK.items()}, "sliding_window": ("window",)}


def _sizes(*values: int | None) -> dict[str, Any]:
    return dict(zip(SIZES, values, strict=True))


DEFAULTS: dict[str, dict[str, Any]] = {  # of transformers for missing values
    "": {
        "vocab_size": VOCAB_SIZE,
        "patch_in_forward": True,
        "patch_size": 4,
        "patching_mode": "entropy",
        "patching_threshold": 1.335442066192627,
        "max_patch_length": None,
        "local_attention_window_len": 512,
        "cross_attn_k": 2,
        "encoder_hash_byte_group_vocab": 500_002,
        "encoder_hash_byte_group_nb_functions": 1,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    },
    "patcher_config": {**_sizes(768, 14, 12, 2048), "sliding_window": 512, "max_position_embeddings": 8192},
    "encoder_config": {**_sizes(1024, 1, 16, None), "cross_attn_all_layers": False, "cross_attn_k": 2},
    "decoder_config": {
        **_sizes(1024, 9, 16, 2816),
        "cross_attn_all_layers": True,
        "cross_attn_k": 2,
        "hidden_size_global": 2048,
    },
    "global_config": _sizes(2048, 25, 16, 5632),
}
DEFAULT_THETA, DEFAULT_PATCHER_THETA = 500_000.0, 10_000.0


class HuggingFaceFormat(WeightsFormat):
    modes = MODES
    block_options = ("rope_scaling",)
    column = TRANSFORMERS_NAMES
    loaded_by = "transformers"
    loading = (
        "from transformers import AutoTokenizer, BltForCausalLM",
        "",
        "model = BltForCausalLM.from_pretrained(FOLDER)",
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        "# Batch texts of one length only: transformers reads padding as text. Version 4 has no attention windows.",
        "",
        "# or, many times faster:",
        *LOADING,
    )

    def recognizes(self, folder: Path) -> bool:
        config = folder / "config.json"
        return config.is_file() and read_json_object(config).get("model_type") == "blt"

    def read_config(self, folder: Path) -> StoredModel:
        """A BLT, with its patcher as the byte LM."""
        values, where = read_json_object(folder / "config.json"), str(folder / "config.json")
        config = read_sidecar(folder, read_model(values, where), lambda own: read_model(config_of(own, True), where))
        stored = StoredModel(config, {}, None, "transformers' BltForCausalLM", str(folder))
        patcher = read_patcher(values, where)
        if patcher is None:
            return stored

        def again(own: Config) -> Config:
            return read_patcher({"patcher_config": patcher_config_of(own)}, where) or own

        return replace(stored, byte_lm=replace(stored, config=read_sidecar(folder, patcher, again, BYTE_LM_SIDECAR)))

    def read_tensors(self, found: StoredModel) -> StoredModel:
        tensors = read_weights(Path(found.source))
        if NO_TABLES in tensors and tensors[NO_TABLES].shape[:1] == (0,):
            tensors.pop(NO_TABLES)
        if found.byte_lm is None:
            return self.with_tensors(found, tensors)
        patcher = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PATCHER)}
        return replace(self.with_tensors(found, tensors), byte_lm=self.with_tensors(found.byte_lm, patcher))

    def write_config(self, folder: Path, stored: StoredModel) -> None:
        config, byte_lm = stored.config, stored.byte_lm
        if not isinstance(config.model, BLTSettings) or config.patching is None:
            raise UserError(
                "hf: transformers has no class for a byte LM alone; convert it together with its BLT, or to meta"
            )
        if config.patching.needs_entropies and byte_lm is None:
            raise UserError(
                f"hf: patching mode '{config.patching.mode}' needs the byte LM in the same folder; name it: "
                "--entropy-model FOLDER"
            )
        values = config_of(config, byte_lm is not None)
        write_sidecar(folder, config)
        if byte_lm is not None:
            values["patcher_config"] = patcher_config_of(byte_lm.config)
            write_sidecar(folder, byte_lm.config, BYTE_LM_SIDECAR)
        values["dtype"] = stored.precision
        write_json_object(folder / "config.json", values)
        write_json_object(folder / "generation_config.json", {**SPECIAL_IDS, "use_cache": False, "do_sample": False})
        write_tokenizer(folder, config.context, stored.chat_template is not None)

    def stored_tensors(self, stored: StoredModel) -> dict[str, StoredTensor]:
        tensors = dict(super().stored_tensors(stored))
        model = stored.config.model
        if isinstance(model, BLTSettings) and model.ngram_hash is None:
            tensors[NO_TABLES] = StoredTensor(next(iter(tensors.values())).dtype, (0, model.encoder.dim), ())
        return tensors | (self.stored_tensors(stored.byte_lm) if stored.byte_lm is not None else {})


def read_model(values: Mapping[str, Any], where: str) -> Config:
    """The configuration of the BLT that a `config.json` describes.

    Raises:
        UserError: a value requires a computation that is not implemented.
    """
    top = ConfigPart({**DEFAULTS[""], **values}, where=where)
    parts = {name: top.part(name, DEFAULTS[name]) for name in PARTS}
    encoder = parts["encoder_config"]
    top.rope("default")  # transformers ignores it at the top level, but its author meant it
    top.check("tie_word_embeddings", top["tie_word_embeddings"], False)
    for part in (top, encoder, parts["decoder_config"]):
        part.check("vocab_size", part.get("vocab_size", VOCAB_SIZE), VOCAB_SIZE)
    if encoder["cross_attn_all_layers"] and encoder["num_hidden_layers"] > 1:
        raise UserError(
            f"{where}: encoder_config.cross_attn_all_layers is true with {encoder['num_hidden_layers']} layers; "
            "transformers then pools again after each layer and the published model does not, so it is not clear what "
            "these weights mean. If they were converted from published weights, convert those instead"
        )
    given = {
        f"{name}.{key}": value for name, part in parts.items() for key, value in part.resolved(DEFAULT_THETA).items()
    }
    model = our_settings({**top, **given}, BLT_KEYS, where)
    model |= {stack: parts[name].stack(model[stack]) for name, stack in PARTS.items()}
    model["cross_attention"]["num_kv_heads"] = encoder.get("num_key_value_heads")
    del model["cross_attention"]["kv_heads"]
    model["ngram_hash"] = None
    if top["encoder_hash_byte_group_nb_functions"]:
        sizes = top.get("encoder_hash_byte_group_size") or [3, 4, 5, 6, 7, 8]
        hashes = our_settings({**top, "encoder_hash_byte_group_size": sizes}, HASH_KEYS, where)["ngram_hash"]
        model["ngram_hash"] = {**hashes, "stop_at_document": False}
    patching = {"mode": "byte", "max_patch_length": top["max_patch_length"]}
    if top["patching_mode"] == "entropy":  # in all other modes, transformers makes each byte a patch
        patching |= {"mode": "entropy", "threshold": top["patching_threshold"]}
        if top["patch_size"] is None:
            raise UserError(
                f"{where}: patch_size is None; transformers then makes each byte a patch: say patching_mode 'byte'"
            )
    return Config(
        model=BLTSettings.parse(model, where),
        context=top.context,
        patching=PatchSettings.parse(patching, where=where),
    )


def read_patcher(values: Mapping[str, Any], where: str) -> Config | None:
    """The same for the patcher, which is a byte LM; None if the model has no patcher."""
    top = ConfigPart({**DEFAULTS[""], **values}, where=where)
    if not top["patch_in_forward"]:
        return None
    patcher = top.part("patcher_config", DEFAULTS["patcher_config"])
    patcher.check("vocab_size", patcher.get("vocab_size", VOCAB_SIZE), VOCAB_SIZE)
    stack = patcher.stack(our_settings(patcher.resolved(DEFAULT_PATCHER_THETA), PATCHER_KEYS, where))
    return Config(model=ByteLMSettings(**stack.model_dump()), context=patcher.context)


def config_of(config: Config, has_byte_lm: bool) -> dict[str, Any]:
    """`config.json` for a BLT, without its patcher.

    Raises:
        UserError: transformers would compute something else.
    """
    model, patching = config.model, config.patching
    assert isinstance(model, BLTSettings)
    assert patching is not None
    if patching.monotonicity or patching.threshold_add is not None or patching.reset_at_newline:
        raise UserError(
            f"hf: transformers has only the plain entropy mode, not '{patching.in_words()}'; use native"
            f"{'' if patching.reset_at_newline else ' or meta'}"
        )
    if model.cross_attention is not None and model.cross_attention.all_layers_encoder and model.encoder.num_layers > 1:
        raise UserError(
            "hf: cross_attention.all_layers_encoder with several encoder layers: transformers pools again after each "
            "layer and would compute something else; keep the model in our format or convert it to meta"
        )
    values = nested(
        {
            "architectures": ["BltForCausalLM"],
            "model_type": "blt",
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": config.context,
            "patch_in_forward": has_byte_lm,
            "patch_size": 4,  # transformers only checks whether it is set
            "patching_mode": patching.mode,
            "patching_threshold": patching.threshold,
            "patching_batch_size": 1,
            "max_patch_length": patching.max_patch_length,
            "tie_word_embeddings": False,
            "use_cache": False,  # the cache of transformers fails for this model
            **SPECIAL_IDS,
            **their_settings(model, BLT_KEYS, "hf"),
            **(their_settings(model, HASH_KEYS, "hf") if model.ngram_hash is not None else NO_HASHES),
        }
    )
    local = {"vocab_size": VOCAB_SIZE, "hidden_size_global": model.global_transformer.dim}
    more = {"encoder_config": local, "decoder_config": local, "global_config": {}}
    kinds = ("blt_local_encoder", "blt_global_transformer", "blt_local_decoder")
    for (name, stack), kind in zip(PARTS.items(), kinds, strict=True):
        values[name] |= {**fixed_of_stack(getattr(model, stack), config.context), "model_type": kind, **more[name]}
    return values


def patcher_config_of(config: Config) -> dict[str, Any]:
    """The `patcher_config` of `config.json` for a byte LM."""
    assert isinstance(config.model, ByteLMSettings)
    values = their_settings(config.model, PATCHER_KEYS, "hf")
    fixed = fixed_of_stack(config.model, config.context)
    return {**values, **fixed, "model_type": "blt_patcher", "vocab_size": VOCAB_SIZE}
