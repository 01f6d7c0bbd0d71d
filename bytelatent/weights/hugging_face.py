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
from bytelatent.model.settings import LONGEST_CONTEXT, StackSettings
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
from bytelatent.weights.safetensors_io import StoredTensor, read_json_object, read_weights, shown, write_json_object
from bytelatent.weights.side_files import read_sidecar, write_sidecar, write_tokenizer
from bytelatent.weights.stored_model import Config, StoredModel

BYTE_LM_SIDECAR = "bytelatent.byte_lm.json"
PATCHER = "model.patcher."
NO_TABLES = "model.encoder_hash_tok_embedding.weight"  # empty in a model without n-gram hashes
MODES = ("entropy", "byte")
SPECIAL_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": BOE}

# The keys of a part of `config.json` and our settings.
STACK = {
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "hidden_dim",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
}
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

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


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


class Part(dict[str, Any]):
    """The values of a part of a `config.json`; the top level has no name."""

    def __init__(self, values: Mapping[str, Any], name: str = "", where: str = ""):
        super().__init__(values)
        self.where, self.name = where, name

    def path(self, key: str) -> str:
        return f"{self.where}: {self.name}.{key}" if self.name else f"{self.where}: {key}"

    def check(self, key: str, value: Any, *allowed: Any) -> None:
        """Refuse a value that requires a computation that is not implemented."""
        if value not in allowed:
            raise UserError(f"{self.path(key)} is {shown(repr(value))}; only {shown(repr(allowed[0]))} is known here")

    def group(self, key: str) -> dict[str, Any]:
        """The keys and values under a key; empty if it is absent."""
        found = self.get(key)
        if found is not None and not isinstance(found, dict):
            raise UserError(f"{self.path(key)} is {shown(repr(found))}; it should be a mapping of keys to values")
        return found or {}

    def part(self, name: str) -> "Part":
        part = Part({**DEFAULTS[name], **self.group(name)}, name, self.where)
        part.check_sizes()
        return part

    def check_sizes(self) -> None:
        for key in SIZES:
            value = self.get(key)
            if not (type(value) is int and value > 0) and not (value is None and key == "intermediate_size"):
                raise UserError(f"{self.path(key)} is {shown(repr(value))}; it should be a number above 0")

    @property
    def context(self) -> int:
        """The context in training, in ids."""
        key = "max_position_embeddings"
        if type(self[key]) is not int or not 1 <= self[key] <= LONGEST_CONTEXT:
            raise UserError(
                f"{self.path(key)} is {shown(repr(self[key]))}; it should be a number from 1 to {LONGEST_CONTEXT:,}"
            )
        return self[key]

    def resolved(self, default_theta: float = DEFAULT_THETA) -> dict[str, Any]:
        """All values, with those that follow from others."""
        return {
            "rms_norm_eps": 1e-5,
            **self,
            "num_key_value_heads": self.get("num_key_value_heads") or self["num_attention_heads"],
            "intermediate_size": self["intermediate_size"] or 8 * self["hidden_size"] // 3,
            "rope_theta": self.rope_theta(default_theta),
        }

    def stack(self, values: dict[str, Any]) -> StackSettings:
        """The settings of a stack from its values by `STACK`."""
        head_dim = values["dim"] // values["num_heads"]
        self.check("hidden_act", self.get("hidden_act", "silu"), "silu")
        self.check("head_dim", self.get("head_dim") or head_dim, head_dim)
        width = _width(values["dim"], values.pop("hidden_dim"))
        values |= {"num_kv_heads": self.get("num_key_value_heads"), **width}
        del values["kv_heads"]
        return StackSettings.parse(values, f"{self.where}: {self.name}")

    def rope_theta(self, default: float) -> float:
        """The theta of the rotary embedding.

        transformers 5 reads `rope_scaling`, else `rope_parameters`, and `rope_theta` only if these name no theta.
        transformers 4 reads `rope_theta` and the type in `rope_scaling`.

        Raises:
            UserError: it is not the default type, or the two versions of transformers would read another theta.
        """
        alone = self.get("rope_theta", default)
        found = {"rope_theta": alone} if "rope_theta" in self else {}
        found |= {key: rope.get("rope_theta", alone) for key, rope in self.plain_rope().items() if rope}
        first = next(iter(found.values()), default)
        if any(theta != first for theta in found.values()):
            thetas = ", ".join(f"{self.name}.{key} = {shown(repr(theta))}" for key, theta in found.items())
            raise UserError(
                f"{self.where}: the rotary theta is not clear: {thetas}; which one counts depends on the version of "
                "transformers, so let them agree"
            )
        return first

    def plain_rope(self) -> dict[str, dict[str, Any]]:
        """The settings of the rotary embedding by either name; they must describe the plain one."""
        found = {key: self.group(key) for key in ("rope_scaling", "rope_parameters")}
        for key, rope in found.items():
            self.check(f"{key}.rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
            self.check(f"{key}.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0, None)
            if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
                raise UserError(f"{self.path(key)}.{shown(nested[0])}: settings by kind of layer are not known here")
        self.check("partial_rotary_factor", self.get("partial_rotary_factor", 1.0), 1.0, None)
        return found


def read_model(values: Mapping[str, Any], where: str) -> Config:
    """The configuration of the BLT that a `config.json` describes.

    Raises:
        UserError: a value requires a computation that is not implemented.
    """
    top = Part({**DEFAULTS[""], **values}, where=where)
    parts = {name: top.part(name) for name in PARTS}
    encoder = parts["encoder_config"]
    top.plain_rope()  # transformers ignores it at the top level, but its author meant it
    top.check("tie_word_embeddings", top["tie_word_embeddings"], False)
    for part in (top, encoder, parts["decoder_config"]):
        part.check("vocab_size", part.get("vocab_size", VOCAB_SIZE), VOCAB_SIZE)
    if encoder["cross_attn_all_layers"] and encoder["num_hidden_layers"] > 1:
        raise UserError(
            f"{where}: encoder_config.cross_attn_all_layers is true with {encoder['num_hidden_layers']} layers; "
            "transformers then pools again after each layer and the published model does not, so it is not clear what "
            "these weights mean. If they were converted from published weights, convert those instead"
        )
    given = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.resolved().items()}
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
    top = Part({**DEFAULTS[""], **values}, where=where)
    if not top["patch_in_forward"]:
        return None
    patcher = top.part("patcher_config")
    patcher.check("vocab_size", patcher.get("vocab_size", VOCAB_SIZE), VOCAB_SIZE)
    stack = patcher.stack(our_settings(patcher.resolved(DEFAULT_PATCHER_THETA), PATCHER_KEYS, where))
    return Config(model=ByteLMSettings(**stack.model_dump()), context=patcher.context)


def _width(dim: int, hidden: int) -> dict[str, Any]:
    """`multiple_of` and `ffn_dim_multiplier` that give this feed-forward width."""
    base = int(2 * 4 * dim / 3)
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if -(-base // multiple) * multiple == hidden:
            return {"multiple_of": multiple}
    return {"multiple_of": 1, "ffn_dim_multiplier": (hidden + 0.5) / base}


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


def fixed_of_stack(stack: StackSettings, context: int) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "dropout": 0.0,
        "max_position_embeddings": context,
        "rope_parameters": {"rope_type": "default", "rope_theta": stack.rope_theta},  # transformers 4 reads rope_theta
    }
