"""Meta's arguments and our settings: what is carried across, what must be so, what changes nothing."""

from pathlib import Path
from typing import Any

from bytelatent.errors import UserError
from bytelatent.model import BLTSettings, ByteLMSettings, ModelSettings
from bytelatent.model.settings import CrossAttentionSettings, NgramHashSettings, StackSettings
from bytelatent.patching import PatchSettings
from bytelatent.weights.safetensors_io import shown
from bytelatent.weights.stored_model import Config

MODES = ("entropy", "space", "static", "byte")  # of the published code; its other ones cut at tokens
# What must be so, since the mathematics here knows nothing else; also what is written. A missing key is taken to be so.
SAME_IN_BOTH: dict[str, list[Any]] = {
    "head_dim": [None],
    "tie_local_encoder_decoder": [False, None],
    "tie_local_encoder_decoder_logits": [False, None],
    "weight_tying": [False, None],
    "vocab_size": [260],
}
BLT_ONLY: dict[str, list[Any]] = {
    "alpha_depth": ["disabled", None],
    "architecture": ["vanilla", None],
    "attn_to_keep": ["all", None],
    "conv_kernel_size": [None],
    "cross_attn_decoder": [True],
    "cross_attn_encoder": [True],
    "cross_attn_init_by_pooling": [True],
    "cross_attn_window_decoder": [None],
    "cross_attn_window_encoder": [None],
    "dim_patch_emb": [None],
    "downsampling_by_pooling": ["max"],
    "encoder_enable_byte_ngrams": [False, None],
    "encoder_lm_loss": [False, None],
    "encoder_ngram_table_dir": [None],
    "encoder_ngram_to_size_str": [None],
    "encoder_preds_low_entropy_toks": [None],
    "encoder_preds_random_toks": [None],
    "entropy_model_is_ngram_model": [False, None],
    "global_local_decoder_residual_layer": [None],
    "n_kv_heads": [None],
    "ngram_vocab_sizes": [None],
    "non_linearity": ["swiglu", None],
    "norm_affine": [True, None],
    "norm_type": ["rmsnorm", None],
    "output_size": [-1, 260, None],
    "patching_thresholds_str": [None],
    "pm_size": [0, None],
    "pre_norm": [True, None],
    "tokenize_with_bpe_delimiter": [False, None],
    "use_local_encoder_transformer": [True],
    "use_rope": [True],
}
# What the readers below read.
READ = {
    "cross_attn_all_layers_decoder",
    "cross_attn_all_layers_encoder",
    "cross_attn_k",
    "cross_attn_nheads",
    "dim",
    "dim_global",
    "dim_local_decoder",
    "dim_local_encoder",
    "dim_token",
    "dim_token_emb",
    "encoder_hash_byte_group_nb_functions",
    "encoder_hash_byte_group_size",
    "encoder_hash_byte_group_vocab",
    "ffn_dim_multiplier",
    "local_attention_window_len",
    "max_patch_length",
    "monotonicity",
    "multiple_of",
    "n_heads",
    "n_heads_global",
    "n_heads_local_decoder",
    "n_heads_local_encoder",
    "n_kv_heads",
    "n_kv_heads_global",
    "n_layers",
    "n_layers_global",
    "n_layers_local_decoder",
    "n_layers_local_encoder",
    "norm_eps",
    "patch_size",
    "patching_mode",
    "patching_threshold",
    "patching_threshold_add",
    "rope_theta",
    "sliding_window",
}
# What changes no logits: how the model is begun, trained, sharded, logged and run.
OF_NO_MATTER = {
    "attn_bias_type",
    "attn_impl",
    "cross_attn_use_flex_attention",
    "custom_bwd",
    "dropout",
    "encoder_enable_byte_group_hash",
    "eos_id",
    "entropy_model_checkpoint_dir",
    "full_logging_n_layers",
    "fuse_sequence_parallel",
    "init_base_std",
    "init_std_factor",
    "init_use_depth",
    "init_use_gaussian",
    "layer_ckpt",
    "log_patch_lengths",
    "loss_parallel",
    "max_encoder_seq_length",
    "max_length",
    "max_seqlen",
    "pad_to_max_length",
    "patch_in_forward",
    "patching_batch_size",
    "patching_device",
    "recompute_attn",
    "recompute_fc1_out",
    "recompute_fc3_out",
    "rope_use_fp32_in_outer_product",
    "seed",
    "sequence_parallel",
    "share_encoder_decoder_emb",
    "use_fsdp",
}


def is_byte_lm(args: dict[str, Any]) -> bool:
    """Whether these are the arguments of an entropy model."""
    return "n_layers_local_encoder" not in args


def refuse_what_is_not_known(args: dict[str, Any], folder: Path) -> list[str]:
    """Complain about settings that change the mathematics; a line about each that nobody here knows."""
    required = SAME_IN_BOTH if is_byte_lm(args) else SAME_IN_BOTH | BLT_ONLY
    for key, allowed in required.items():
        if key in args and args[key] not in allowed:
            raise UserError(
                f"'{folder}': {key} is {shown(repr(args[key]))}; only {allowed[0]!r} is known here, "
                "and the model would compute something else"
            )
    if not is_byte_lm(args):
        for key in ("dim_token", "dim_token_emb"):
            if args.get(key) not in (None, args["dim_local_encoder"]):
                raise UserError(
                    f"'{folder}': {key} is {shown(repr(args[key]))}; only embeddings as wide as the local encoder "
                    f"(dim_local_encoder {args['dim_local_encoder']}) are known here"
                )
    known = SAME_IN_BOTH.keys() | BLT_ONLY.keys() | READ | OF_NO_MATTER
    unknown = [key for key, value in args.items() if key not in known and value not in (None, False)]
    if rotary := [key for key in unknown if "rope" in key]:
        raise UserError(
            f"'{folder}': {shown(rotary[0])} is {shown(repr(args[rotary[0]]))}; only the plain rotary embedding is "
            "known here, and the model would compute something else"
        )
    return [
        f"'{folder}': nobody here knows what {shown(f'{key}={args[key]!r}')} does; it is left out" for key in unknown
    ]


def _byte_lm_settings(args: dict[str, Any], where: str) -> ByteLMSettings:
    values = {
        "dim": args["dim"],
        "num_layers": args["n_layers"],
        "num_heads": args["n_heads"],
        "num_kv_heads": args.get("n_kv_heads"),
        "window": args.get("sliding_window"),
        **_shared(args),
    }
    return ByteLMSettings.parse(values, where)


def _blt_settings(args: dict[str, Any], where: str) -> BLTSettings:
    def stack(part: str, **others: Any) -> StackSettings:
        values = {
            "dim": args[f"dim_{part}"],
            "num_layers": args[f"n_layers_{part}"],
            "num_heads": args[f"n_heads_{part}"],
            **_shared(args),
            **others,
        }
        return StackSettings.parse(values, f"{where}: {part}")

    window = args["local_attention_window_len"]
    sizes = args["encoder_hash_byte_group_size"]
    return BLTSettings(
        encoder=stack("local_encoder", window=window),
        global_transformer=stack("global", num_kv_heads=args.get("n_kv_heads_global")),
        decoder=stack("local_decoder", window=window),
        cross_attention=CrossAttentionSettings(
            k=args["cross_attn_k"],
            num_heads=args["cross_attn_nheads"],
            all_layers_encoder=args["cross_attn_all_layers_encoder"],
            all_layers_decoder=args["cross_attn_all_layers_decoder"],
        ),
        ngram_hash=NgramHashSettings(
            sizes=sizes,
            num_functions=args["encoder_hash_byte_group_nb_functions"],
            vocab_size=args["encoder_hash_byte_group_vocab"],
            stop_at_document=False,
        )
        if sizes
        else None,
    )


def _shared(args: dict[str, Any]) -> dict[str, Any]:
    return {
        "ffn_dim_multiplier": args.get("ffn_dim_multiplier") or 1.0,
        "multiple_of": args.get("multiple_of", 256),
        "rope_theta": args.get("rope_theta", 10_000.0),
        "norm_eps": args.get("norm_eps", 1e-5),
    }


def _patching(args: dict[str, Any], patcher: dict[str, Any], where: str) -> PatchSettings:
    """The rule of the patcher in training, which knows the threshold; the model's arguments often do not."""
    mode = patcher.get("patching_mode", args.get("patching_mode"))
    values = {"mode": mode, "max_patch_length": patcher.get("max_patch_length", args.get("max_patch_length"))}
    if mode == "entropy":
        values["threshold"] = patcher.get("threshold", args.get("patching_threshold"))
        values["threshold_add"] = patcher.get("threshold_add", args.get("patching_threshold_add"))
        values["monotonicity"] = patcher.get("monotonicity", args.get("monotonicity")) or False
    if mode == "static":
        size = patcher.get("patch_size") or args["patch_size"]
        values["patch_size"] = size  # 4.0 is taken for 4, and 4.5 is refused
    return PatchSettings.parse(values, where=where)


def settings_of(
    args: dict[str, Any], patcher: dict[str, Any] | None, where: str = ""
) -> tuple[ModelSettings, PatchSettings | None]:
    """The shapes, and for a BLT the rule that it was trained with."""
    if is_byte_lm(args):
        return _byte_lm_settings(args, where), None
    return _blt_settings(args, where), _patching(args, patcher or {}, where)


def args_of(config: Config) -> dict[str, Any]:
    """What `config.json` says of a model.

    Raises:
        UserError: the format has no room for one of its settings.
    """
    model = config.model
    required = SAME_IN_BOTH if isinstance(model, ByteLMSettings) else SAME_IN_BOTH | BLT_ONLY
    constant = {key: allowed[0] for key, allowed in required.items()}
    if isinstance(model, ByteLMSettings):
        return constant | {
            "dim": model.dim,
            "n_layers": model.num_layers,
            "n_heads": model.num_heads,
            "n_kv_heads": model.num_kv_heads,
            "sliding_window": model.window,
            "attn_bias_type": "local_block_causal" if model.window else "causal",
            "attn_impl": "sdpa",
            "max_seqlen": config.context,
            **_shared_args(model),
        }
    encoder, middle, decoder, cross = model.encoder, model.global_transformer, model.decoder, model.cross_attention
    for key in ("multiple_of", "ffn_dim_multiplier", "rope_theta", "norm_eps", "window"):
        values = [
            getattr(stack, key) for stack in ([encoder, decoder] if key == "window" else [encoder, middle, decoder])
        ]
        if any(value != values[0] for value in values):
            raise UserError(
                f"meta: {key} differs between the parts of the model ({values}), and the format has only one"
            )
    for name, stack in (("encoder", encoder), ("decoder", decoder), ("cross_attention", cross)):
        if stack.kv_heads != stack.num_heads:
            raise UserError(f"meta: the format has no key for {name}.num_kv_heads ({stack.num_kv_heads})")
    ngrams = model.ngram_hash
    return constant | {
        "dim": middle.dim,
        "n_layers": middle.num_layers,
        "n_heads": middle.num_heads,
        "dim_token": encoder.dim,
        "dim_token_emb": None,
        "dim_global": middle.dim,
        "n_layers_global": middle.num_layers,
        "n_heads_global": middle.num_heads,
        "n_kv_heads_global": middle.num_kv_heads,
        "dim_local_encoder": encoder.dim,
        "n_layers_local_encoder": encoder.num_layers,
        "n_heads_local_encoder": encoder.num_heads,
        "dim_local_decoder": decoder.dim,
        "n_layers_local_decoder": decoder.num_layers,
        "n_heads_local_decoder": decoder.num_heads,
        "local_attention_window_len": encoder.window,
        "cross_attn_k": cross.k,
        "cross_attn_nheads": cross.num_heads,
        "cross_attn_all_layers_encoder": cross.all_layers_encoder,
        "cross_attn_all_layers_decoder": cross.all_layers_decoder,
        "cross_attn_use_flex_attention": False,
        "encoder_hash_byte_group_size": ngrams.sizes if ngrams else None,
        "encoder_hash_byte_group_nb_functions": ngrams.num_functions if ngrams else 1,
        "encoder_hash_byte_group_vocab": ngrams.vocab_size if ngrams else 500_002,
        "max_seqlen": config.context,
        "max_encoder_seq_length": config.context,
        "max_length": config.context,
        "attn_impl": "sdpa",
        "attn_bias_type": "causal",
        **_shared_args(encoder),
        **_rule_args(config.patching),
    }


def _shared_args(stack: StackSettings) -> dict[str, Any]:
    return {
        "ffn_dim_multiplier": stack.ffn_dim_multiplier,
        "multiple_of": stack.multiple_of,
        "rope_theta": stack.rope_theta,
        "norm_eps": stack.norm_eps,
    }


def _rule_args(patching: PatchSettings | None) -> dict[str, Any]:
    if patching is None:
        return {}
    return {
        "patching_mode": patching.mode,
        "patching_threshold": patching.threshold,
        "patching_threshold_add": patching.threshold_add,
        "monotonicity": patching.monotonicity,
        "max_patch_length": patching.max_patch_length,
        "patch_size": float(patching.patch_size or 4.5),  # elsewhere than in 'static' it says only what was wanted
    }


def patcher_args_of(config: Config) -> dict[str, Any] | None:
    """What `train_args.json` says of the rule; None for a byte LM."""
    patching = config.patching
    if patching is None:
        return None
    if patching.mode not in MODES:
        raise UserError(
            f"meta: the published code has no patching mode '{patching.mode}' as this project computes it, only "
            f"{', '.join(MODES)}; keep the model in our format"
        )
    values = {
        "patching_mode": patching.mode,
        "threshold": patching.threshold,
        "threshold_add": patching.threshold_add,
        "monotonicity": patching.monotonicity,
        "max_patch_length": patching.max_patch_length,
        "patch_size": float(patching.patch_size or 4.5),
    }
    return {key: value for key, value in values.items() if value is not None}
