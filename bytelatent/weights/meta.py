"""Meta's formats.

The format on the hub: `config.json` (`args`), `model.safetensors`, `train_args.json`. The older one: `params.json` (all
settings of the training), `consolidated.pth`. The entropy model is in a folder of its own, in either format.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytelatent.errors import UserError
from bytelatent.model import BLTSettings, ByteLMSettings, TokenLMSettings
from bytelatent.patching import PatchSettings
from bytelatent.weights.native import (
    META_NAMES,
    SettingsTable,
    WeightsFormat,
    our_settings,
    their_settings,
)
from bytelatent.weights.safetensors_io import (
    StoredTensor,
    read_json_object,
    read_pickle,
    read_weights,
    shown,
    write_json_object,
)
from bytelatent.weights.side_files import read_sidecar, write_sidecar
from bytelatent.weights.stored_model import Config, StoredModel

BYTE_LM = "blt-entropy"  # where we write it, and the name of Meta's own repository
BYTE_LM_FOLDERS = (BYTE_LM, "entropy_model", "blt_entropy")
PUBLISHED_CONTEXT = 8192
PUBLISHED_WINDOW = 512  # of the entropy model; older files do not state it
MODES = ("entropy", "space", "static", "byte")  # other modes of the published code cut at tokens

# Meta's arguments and our settings.
PARTS = {"local_encoder": "encoder", "global": "global_transformer", "local_decoder": "decoder"}
SIZES = {"dim": "dim", "n_layers": "num_layers", "n_heads": "num_heads"}
SHARED = ("ffn_dim_multiplier", "multiple_of", "rope_theta", "norm_eps")
BYTE_LM_ARGS: SettingsTable = {
    **{key: (ours,) for key, ours in SIZES.items()},
    "n_kv_heads": ("num_kv_heads",),
    "sliding_window": ("window",),
    **{key: (key,) for key in SHARED},
}
BLT_ARGS: SettingsTable = {
    **{f"{key}_{part}": (f"{stack}.{ours}",) for part, stack in PARTS.items() for key, ours in SIZES.items()},
    "n_kv_heads_global": ("global_transformer.num_kv_heads",),
    "local_attention_window_len": ("encoder.window", "decoder.window"),
    "cross_attn_k": ("cross_attention.k",),
    "cross_attn_nheads": ("cross_attention.num_heads",),
    "cross_attn_all_layers_encoder": ("cross_attention.all_layers_encoder",),
    "cross_attn_all_layers_decoder": ("cross_attention.all_layers_decoder",),
    **{key: tuple(f"{stack}.{key}" for stack in PARTS.values()) for key in SHARED},
}
HASH_ARGS: SettingsTable = {
    "encoder_hash_byte_group_size": ("ngram_hash.sizes",),
    "encoder_hash_byte_group_nb_functions": ("ngram_hash.num_functions",),
    "encoder_hash_byte_group_vocab": ("ngram_hash.vocab_size",),
}
NO_HASHES = {
    "encoder_hash_byte_group_size": None,
    "encoder_hash_byte_group_nb_functions": 1,
    "encoder_hash_byte_group_vocab": 500_002,
}
PATCHING_ARGS = {  # the model's argument, the patcher's, our setting
    "patching_mode": ("patching_mode", "mode"),
    "patching_threshold": ("threshold", "threshold"),
    "patching_threshold_add": ("threshold_add", "threshold_add"),
    "monotonicity": ("monotonicity", "monotonicity"),
    "max_patch_length": ("max_patch_length", "max_patch_length"),
    "patch_size": ("patch_size", "patch_size"),
}
DEFAULTS = {  # of arguments that may be missing
    "n_kv_heads": None,
    "n_kv_heads_global": None,
    "sliding_window": None,
    "multiple_of": 256,
    "rope_theta": 10_000.0,
    "norm_eps": 1e-5,
}
# Arguments for which only these values mean the mathematics implemented here; the first one is written.
FIXED: dict[str, list[Any]] = {
    "head_dim": [None],
    "tie_local_encoder_decoder": [False, None],
    "tie_local_encoder_decoder_logits": [False, None],
    "weight_tying": [False, None],
    "vocab_size": [260],
}
NEVER_SET = (
    "conv_kernel_size", "cross_attn_window_decoder", "cross_attn_window_encoder", "dim_patch_emb",
    "encoder_ngram_table_dir", "encoder_ngram_to_size_str", "encoder_preds_low_entropy_toks",
    "encoder_preds_random_toks", "global_local_decoder_residual_layer", "n_kv_heads", "ngram_vocab_sizes",
    "patching_thresholds_str",
)  # fmt: skip
ALWAYS = (
    "cross_attn_decoder", "cross_attn_encoder", "cross_attn_init_by_pooling", "use_local_encoder_transformer",
    "use_rope",
)  # fmt: skip
NEVER = (
    "encoder_enable_byte_ngrams", "encoder_lm_loss", "entropy_model_is_ngram_model", "tokenize_with_bpe_delimiter",
)  # fmt: skip
BLT_FIXED: dict[str, list[Any]] = {
    **FIXED,
    **{key: [None] for key in NEVER_SET},
    **{key: [True] for key in ALWAYS},
    **{key: [False, None] for key in NEVER},
    "alpha_depth": ["disabled", None],
    "architecture": ["vanilla", None],
    "attn_to_keep": ["all", None],
    "downsampling_by_pooling": ["max"],
    "non_linearity": ["swiglu", None],
    "norm_affine": [True, None],
    "norm_type": ["rmsnorm", None],
    "output_size": [-1, 260, None],
    "pm_size": [0, None],
    "pre_norm": [True, None],
}
EMBEDDING_WIDTHS = ("dim_token", "dim_token_emb")
# Arguments that change no logits: of initialization, training, sharding, logging, speed.
IGNORED = {
    "attn_bias_type", "attn_impl", "cross_attn_use_flex_attention", "custom_bwd", "dropout",
    "encoder_enable_byte_group_hash", "eos_id", "entropy_model_checkpoint_dir", "full_logging_n_layers",
    "fuse_sequence_parallel", "init_base_std", "init_std_factor", "init_use_depth", "init_use_gaussian", "layer_ckpt",
    "log_patch_lengths", "loss_parallel", "max_encoder_seq_length", "max_length", "max_seqlen", "pad_to_max_length",
    "patch_in_forward", "patching_batch_size", "patching_device", "recompute_attn", "recompute_fc1_out",
    "recompute_fc3_out", "rope_use_fp32_in_outer_product", "seed", "sequence_parallel", "share_encoder_decoder_emb",
    "use_fsdp",
}  # fmt: skip
KNOWN = {*BYTE_LM_ARGS, *BLT_ARGS, *HASH_ARGS, *PATCHING_ARGS, *BLT_FIXED, *EMBEDDING_WIDTHS, *IGNORED}


class MetaFormat(WeightsFormat):
    modes = MODES
    column = META_NAMES
    byte_lm_folder = BYTE_LM
    shard_bytes = None  # the published code reads no shards

    def recognizes(self, folder: Path) -> bool:
        config = folder / "config.json"
        return (config.is_file() and "args" in read_json_object(config)) or (folder / "params.json").is_file()

    def read_config(self, folder: Path) -> StoredModel:
        """A released BLT with the patching it was trained with, or a released entropy model."""
        args, patcher, words = _read_args(folder)
        try:
            config = _config(args, patcher, str(folder))
        except KeyError as error:
            raise UserError(f"'{folder}': its JSON files lack the key {error}; fetch them again") from None
        warnings = _check_args(args, folder)
        config = read_sidecar(folder, config, lambda own: _config(args_of(own), patcher_args_of(own), ""))
        inner = next((folder / name for name in BYTE_LM_FOLDERS if self.recognizes(folder / name)), None)
        byte_lm = self.read_config(inner) if config.patching is not None and inner is not None else None
        return StoredModel(config, {}, byte_lm, words, str(folder), warnings)

    def read_weights(self, folder: Path) -> dict[str, StoredTensor]:
        hub = ("model.safetensors", "model.safetensors.index.json")
        if any((folder / name).is_file() for name in hub) or not (folder / "params.json").is_file():
            return read_weights(folder)
        if (folder / "consolidated.safetensors").is_file():
            return read_weights(folder, stem="consolidated")
        return read_pickle(folder / "consolidated.pth")

    def write_config(self, folder: Path, stored: StoredModel) -> None:
        args, patcher = args_of(stored.config), patcher_args_of(stored.config)
        write_json_object(folder / "config.json", {"args": args})
        if patcher:
            data = {"patcher_args": patcher, "tokenizer_args": {"name": "blt"}}
            write_json_object(folder / "train_args.json", {"model": args, "data": data})
        write_sidecar(folder, stored.config)


def args_of(config: Config) -> dict[str, Any]:
    """The `args` in `config.json` for a model.

    Raises:
        UserError: the format cannot express one of its settings.
    """
    model, context = config.model, config.context
    if isinstance(model, TokenLMSettings):
        raise UserError("meta: Meta's format has no token LM; keep the model in our format or convert it to hf")
    if isinstance(model, ByteLMSettings):
        attention = {"attn_bias_type": "local_block_causal" if model.window else "causal", "attn_impl": "sdpa"}
        return {**_first(FIXED), **their_settings(model, BYTE_LM_ARGS, "meta"), **attention, "max_seqlen": context}
    own = their_settings(model, BLT_ARGS, "meta")
    for name in ("encoder", "decoder", "cross_attention"):
        part = getattr(model, name)
        if part.kv_heads != part.num_heads:
            raise UserError(f"meta: the format has no key for {name}.num_kv_heads ({part.num_kv_heads})")
    middle = model.global_transformer
    return {
        **_first(BLT_FIXED),
        "dim": middle.dim,
        "n_layers": middle.num_layers,
        "n_heads": middle.num_heads,
        "dim_token": model.encoder.dim,
        "dim_token_emb": None,
        **own,
        **(their_settings(model, HASH_ARGS, "meta") if model.ngram_hash is not None else NO_HASHES),
        "cross_attn_use_flex_attention": False,
        **dict.fromkeys(("max_seqlen", "max_encoder_seq_length", "max_length"), context),
        "attn_impl": "sdpa",
        "attn_bias_type": "causal",
        **_patching_args(config.patching),
    }


def patcher_args_of(config: Config) -> dict[str, Any]:
    """The `patcher_args` in `train_args.json` for a model; empty without patching settings."""
    values = _patching_args(config.patching)
    return {PATCHING_ARGS[key][0]: value for key, value in values.items() if value is not None}


def _first(fixed: Mapping[str, list[Any]]) -> dict[str, Any]:
    return {key: allowed[0] for key, allowed in fixed.items()}


def _patching_args(patching: PatchSettings | None) -> dict[str, Any]:
    if patching is None:
        return {}
    if patching.reset_at_newline:
        raise UserError("meta: the format has no key for patching.reset_at_newline; use native")
    values = {key: getattr(patching, setting) for key, (_, setting) in PATCHING_ARGS.items()}
    # Outside of mode 'static', the published code only notes the size that was aimed at.
    return {**values, "patch_size": float(patching.patch_size or 4.5)}


def _config(args: Mapping[str, Any], patcher: Mapping[str, Any], where: str) -> Config:
    """The model's settings, and for a BLT the patching that it was trained with."""
    given = {**DEFAULTS, **args, "ffn_dim_multiplier": args.get("ffn_dim_multiplier") or 1.0}
    if _is_byte_lm(args):
        byte_lm = ByteLMSettings.parse(our_settings(given, BYTE_LM_ARGS, where), where)
        return Config(model=byte_lm, context=PUBLISHED_CONTEXT)
    values = our_settings(given, BLT_ARGS, where)
    values["ngram_hash"] = None
    if given["encoder_hash_byte_group_size"]:
        hashes = our_settings(given, HASH_ARGS, where)["ngram_hash"]
        values["ngram_hash"] = {**hashes, "stop_at_document": False}
    model = BLTSettings.parse(values, where)
    return Config(model=model, context=PUBLISHED_CONTEXT, patching=_patching(args, patcher, where))


def _patching(args: Mapping[str, Any], patcher: Mapping[str, Any], where: str) -> PatchSettings:
    """The settings of the patcher in training, which state the threshold; the model's arguments often do not."""
    values = {ours: patcher.get(inner, args.get(key)) for key, (inner, ours) in PATCHING_ARGS.items()}
    mode = values["mode"]
    if mode not in MODES:
        raise UserError(f"'{where}': patching_mode is {shown(repr(mode))}; known are {', '.join(MODES)}")
    if mode != "entropy":
        values |= {"threshold": None, "threshold_add": None, "monotonicity": False}
    values["monotonicity"] = values["monotonicity"] or False
    values["patch_size"] = (patcher.get("patch_size") or args["patch_size"]) if mode == "static" else None
    return PatchSettings.parse(values, where=where)  # takes a patch_size of 4.0 and refuses 4.5


def _is_byte_lm(args: Mapping[str, Any]) -> bool:
    return "n_layers_local_encoder" not in args


def _check_args(args: Mapping[str, Any], folder: Path) -> list[str]:
    """Refuse arguments that require a computation that is not implemented; warn about unknown ones."""
    for key, allowed in (FIXED if _is_byte_lm(args) else BLT_FIXED).items():
        if key in args and args[key] not in allowed:
            raise UserError(
                f"'{folder}': {key} is {shown(repr(args[key]))}; only {allowed[0]!r} is known here, "
                "and the model would compute something else"
            )
    for key in () if _is_byte_lm(args) else EMBEDDING_WIDTHS:
        if args.get(key) not in (None, args["dim_local_encoder"]):
            raise UserError(
                f"'{folder}': {key} is {shown(repr(args[key]))}; only embeddings as wide as the local encoder "
                f"(dim_local_encoder {args['dim_local_encoder']}) are known here"
            )
    unknown = [key for key, value in args.items() if key not in KNOWN and value not in (None, False)]
    if rotary := [key for key in unknown if "rope" in key]:
        raise UserError(
            f"'{folder}': {shown(rotary[0])} is {shown(repr(args[rotary[0]]))}; only the plain rotary embedding is "
            "known here, and the model would compute something else"
        )
    return [f"'{folder}': the argument {shown(f'{key}={args[key]!r}')} is unknown and ignored" for key in unknown]


def _read_args(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The model's arguments, the patcher's, and the format in words."""
    config, params, train_args = folder / "config.json", folder / "params.json", folder / "train_args.json"
    if config.is_file() and "args" in read_json_object(config):
        args, patcher = _group(config, read_json_object(config), "args"), {}
        if train_args.is_file() and not _is_byte_lm(args):
            patcher = _group(train_args, _group(train_args, read_json_object(train_args), "data"), "patcher_args")
        return args, patcher, "Meta's hub format"
    values = read_json_object(params)
    args = next(
        (values[key] for key in ("model", "entropy_model", "args") if isinstance(values.get(key), dict)), values
    )
    data = _group(params, values, "data") if values.get("data") is not None else {}
    patcher = _group(params, data, "patcher_args") if data.get("patcher_args") is not None else {}
    if _is_byte_lm(args):
        args = {"sliding_window": PUBLISHED_WINDOW, **args}
    return args, patcher, "Meta's older format"


def _group(file: Path, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The keys and values under a key of a JSON file."""
    if key not in values:
        raise UserError(f"'{file}' lacks the key '{key}'; fetch it again")
    if not isinstance(values[key], dict):
        raise UserError(f"'{file}': {key} is {shown(repr(values[key]))}; it should be a mapping of keys to values")
    return values[key]
