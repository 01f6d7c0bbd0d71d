"""Between the `config.json` of `BltForCausalLM` and our settings: how it is read, checked and written."""

from collections.abc import Mapping
from typing import Any

from bytelatent.errors import UserError
from bytelatent.model import BLTSettings, ByteLMSettings
from bytelatent.model.settings import LONGEST_CONTEXT, StackSettings
from bytelatent.patching import PatchSettings
from bytelatent.vocab import BOE, BOS, EOS, VOCAB_SIZE
from bytelatent.weights.safetensors_io import shown
from bytelatent.weights.stored_model import Config

DEFAULT_THETA, DEFAULT_PATCHER_THETA = 500_000.0, 10_000.0
MODES = ("entropy", "byte")
# Defaults of transformers for missing values.
DEFAULTS: dict[str, dict[str, Any]] = {
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
    "patcher_config": {
        "hidden_size": 768,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "sliding_window": 512,
        "max_position_embeddings": 8192,
    },
    "encoder_config": {
        "hidden_size": 1024,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "intermediate_size": None,
        "cross_attn_all_layers": False,
        "cross_attn_k": 2,
        "max_position_embeddings": 24576,
    },
    "decoder_config": {
        "hidden_size": 1024,
        "num_hidden_layers": 9,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
        "cross_attn_all_layers": True,
        "cross_attn_k": 2,
        "hidden_size_global": 2048,
    },
    "global_config": {
        "hidden_size": 2048,
        "num_hidden_layers": 25,
        "num_attention_heads": 16,
        "intermediate_size": 5632,
    },
}


def read_model(values: Mapping[str, Any], where: str) -> Config:
    """The configuration of the BLT that a `config.json` describes.

    Raises:
        UserError: a value asks for other mathematics than is implemented here.
    """
    top = {**DEFAULTS[""], **values}
    encoder, middle, decoder = (_part(values, f"{part}_config", where) for part in ("encoder", "global", "decoder"))
    k, window = top["cross_attn_k"], top["local_attention_window_len"]
    _plain_rope(values, where, "")  # transformers ignores it here, but its author meant it
    _refuse(where, "tie_word_embeddings", top["tie_word_embeddings"], [False])
    for part, inner in (("", top), ("encoder_config.", encoder), ("decoder_config.", decoder)):
        _refuse(where, f"{part}vocab_size", inner.get("vocab_size", VOCAB_SIZE), [VOCAB_SIZE])
        _refuse(where, f"{part}cross_attn_k", inner["cross_attn_k"], [k])
    _refuse(where, "decoder_config.hidden_size_global", decoder["hidden_size_global"], [middle["hidden_size"]])
    for key in ("num_attention_heads", "num_key_value_heads"):
        # In transformers, a cross-attention has as many heads as its part; here both cross-attentions have the same.
        _refuse(where, f"decoder_config.{key}", _heads(decoder)[key], [_heads(encoder)[key]])
    if encoder["cross_attn_all_layers"] and encoder["num_hidden_layers"] > 1:
        raise UserError(
            f"{where}: encoder_config.cross_attn_all_layers is true with {encoder['num_hidden_layers']} layers; "
            "transformers then pools again after each layer and the published model does not, so it is not clear what "
            "these weights mean. If they were converted from published weights, convert those instead"
        )
    functions = top["encoder_hash_byte_group_nb_functions"]
    ngrams = {
        "sizes": values.get("encoder_hash_byte_group_size") or [3, 4, 5, 6, 7, 8],
        "num_functions": functions,
        "vocab_size": top["encoder_hash_byte_group_vocab"],
        "stop_at_document": False,
    }
    model = {
        "encoder": _stack(encoder, window, where, "encoder_config"),
        "global_transformer": _stack(middle, None, where, "global_config"),
        "decoder": _stack(decoder, window, where, "decoder_config"),
        "cross_attention": {
            "k": k,
            "num_heads": encoder["num_attention_heads"],
            "num_kv_heads": encoder.get("num_key_value_heads"),
            "all_layers_encoder": encoder["cross_attn_all_layers"],
            "all_layers_decoder": decoder["cross_attn_all_layers"],
        },
        "ngram_hash": ngrams if functions else None,
    }
    patching = {"mode": top["patching_mode"], "max_patch_length": top["max_patch_length"]}
    if patching["mode"] == "entropy":
        patching["threshold"] = top["patching_threshold"]
        if top["patch_size"] is None:
            raise UserError(
                f"{where}: patch_size is None; transformers then makes each byte a patch: say patching_mode 'byte'"
            )
    else:  # transformers makes each byte a patch in all other modes
        patching["mode"] = "byte"
    return Config(
        model=BLTSettings.parse(model, where),
        context=_context(top, where),
        patching=PatchSettings.parse(patching, where=where),
    )


def read_byte_lm(values: Mapping[str, Any], where: str) -> Config | None:
    """The configuration of the patcher, which is a byte LM; None if the model has no patcher.

    Raises:
        UserError: a value asks for other mathematics than is implemented here.
    """
    if not {**DEFAULTS[""], **values}["patch_in_forward"]:
        return None
    patcher = _part(values, "patcher_config", where)
    _refuse(where, "patcher_config.vocab_size", patcher.get("vocab_size", VOCAB_SIZE), [VOCAB_SIZE])
    stack = _stack(patcher, patcher["sliding_window"], where, "patcher_config", DEFAULT_PATCHER_THETA)
    return Config(model=ByteLMSettings(**stack.model_dump()), context=_context(patcher, where, "patcher_config."))


def _context(values: Mapping[str, Any], where: str, prefix: str = "") -> int:
    """The context in training, in ids."""
    found = values["max_position_embeddings"]
    if type(found) is not int or not 1 <= found <= LONGEST_CONTEXT:
        raise UserError(
            f"{where}: {prefix}max_position_embeddings is {shown(repr(found))}; it should be a number from 1 to "
            f"{LONGEST_CONTEXT:,}"
        )
    return found


def _stack(
    part: Mapping[str, Any], window: int | None, where: str, name: str, default_theta: float = DEFAULT_THETA
) -> StackSettings:
    _refuse(where, f"{name}.hidden_act", part.get("hidden_act", "silu"), ["silu"])
    head_dim = part["hidden_size"] // part["num_attention_heads"]
    _refuse(where, f"{name}.head_dim", part.get("head_dim") or head_dim, [head_dim])
    hidden = part["intermediate_size"] or 8 * part["hidden_size"] // 3
    values = {
        "dim": part["hidden_size"],
        "num_layers": part["num_hidden_layers"],
        "num_heads": part["num_attention_heads"],
        "num_kv_heads": part.get("num_key_value_heads"),
        "window": window,
        "rope_theta": _rope_theta(part, where, f"{name}.", default_theta),
        "norm_eps": part.get("rms_norm_eps", 1e-5),
        **_width(part["hidden_size"], hidden),
    }
    return StackSettings.parse(values, f"{where}: {name}")


def _rope_theta(part: Mapping[str, Any], where: str, prefix: str, default: float) -> float:
    """The theta of a part's rotary embedding.

    transformers 5 reads `rope_scaling`, else `rope_parameters`, and `rope_theta` only where these name no theta.
    transformers 4 reads `rope_theta` and the type in `rope_scaling`.

    Raises:
        UserError: it is not the default type, or the two versions of transformers would read another theta.
    """
    alone = part.get("rope_theta", default)
    found = {f"{prefix}rope_theta": alone} if "rope_theta" in part else {}
    for key, rope in _plain_rope(part, where, prefix).items():
        if rope:
            found[f"{prefix}{key}"] = rope.get("rope_theta", alone)
    first = next(iter(found.values()), default)
    if any(theta != first for theta in found.values()):
        said = ", ".join(f"{key} says {shown(repr(theta))}" for key, theta in found.items())
        raise UserError(
            f"{where}: the rotary theta is not clear: {said}; which one counts depends on the version of "
            "transformers, so let them agree"
        )
    return first


def _plain_rope(part: Mapping[str, Any], where: str, prefix: str) -> dict[str, dict[str, Any]]:
    """A part's settings of the rotary embedding by either name; they must describe the plain one."""
    found = {key: _group(part, key, where, prefix) for key in ("rope_scaling", "rope_parameters")}
    for key, rope in found.items():
        _refuse(where, f"{prefix}{key}.rope_type", rope.get("rope_type", rope.get("type", "default")), ["default"])
        _refuse(where, f"{prefix}{key}.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), [1.0, None])
        if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
            raise UserError(f"{where}: {prefix}{key}.{shown(nested[0])}: settings by kind of layer are not known here")
    _refuse(where, f"{prefix}partial_rotary_factor", part.get("partial_rotary_factor", 1.0), [1.0, None])
    return found


def _width(dim: int, hidden: int) -> dict[str, Any]:
    """`multiple_of` and `ffn_dim_multiplier` that give this feed-forward width."""
    base = int(2 * 4 * dim / 3)
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if -(-base // multiple) * multiple == hidden:
            return {"multiple_of": multiple}
    return {"multiple_of": 1, "ffn_dim_multiplier": (hidden + 0.5) / base}


def _part(values: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The values of one part, with the sizes checked."""
    part = {**DEFAULTS[name], **_group(values, name, where, "")}
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        value = part[key]
        if not (type(value) is int and value > 0) and not (value is None and key == "intermediate_size"):
            raise UserError(f"{where}: {name}.{key} is {shown(repr(value))}; it should be a number above 0")
    return part


def _group(values: Mapping[str, Any], key: str, where: str, prefix: str) -> dict[str, Any]:
    """The keys and values under a key; none if it is absent."""
    found = values.get(key)
    if found is not None and not isinstance(found, dict):
        raise UserError(f"{where}: {prefix}{key} is {shown(repr(found))}; it should be a mapping of keys to values")
    return found or {}


def _heads(part: Mapping[str, Any]) -> dict[str, int]:
    heads = part["num_attention_heads"]
    return {"num_attention_heads": heads, "num_key_value_heads": part.get("num_key_value_heads") or heads}


def _refuse(where: str, key: str, value: Any, allowed: list[Any]) -> None:
    if value not in allowed:
        raise UserError(f"{where}: {key} is {shown(repr(value))}; only {shown(repr(allowed[0]))} is known here")


def config_of(config: Config, has_byte_lm: bool) -> dict[str, Any]:
    """`config.json` for a BLT, without its patcher.

    Raises:
        UserError: transformers would compute something else.
    """
    model, patching = config.model, config.patching
    assert isinstance(model, BLTSettings)
    assert patching is not None
    encoder, middle, decoder, cross = model.encoder, model.global_transformer, model.decoder, model.cross_attention
    if patching.monotonicity or patching.threshold_add is not None:
        raise UserError(
            f"hf: transformers has only the plain entropy mode, not '{patching.in_words()}'; use native or meta"
        )
    if cross.all_layers_encoder and encoder.num_layers > 1:
        raise UserError(
            "hf: cross_attention.all_layers_encoder with several encoder layers: transformers pools again after each "
            "layer and would compute something else; keep the model in our format or convert it to meta"
        )
    if encoder.window != decoder.window:
        raise UserError(f"hf: encoder.window {encoder.window} and decoder.window {decoder.window} must be the same")
    for name, stack in (("encoder", encoder), ("decoder", decoder)):
        if (stack.num_heads, stack.kv_heads) != (cross.num_heads, cross.kv_heads):
            raise UserError(
                f"hf: cross_attention has {cross.num_heads} heads ({cross.kv_heads} of keys and values) and {name} "
                f"{stack.num_heads} ({stack.kv_heads}); in transformers they are the same"
            )
    local = {"vocab_size": VOCAB_SIZE, "cross_attn_k": cross.k, "hidden_size_global": middle.dim}
    ngrams = model.ngram_hash
    return {
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
        "local_attention_window_len": encoder.window,
        "cross_attn_k": cross.k,
        "encoder_hash_byte_group_size": ngrams.sizes if ngrams else [3],
        "encoder_hash_byte_group_vocab": ngrams.vocab_size if ngrams else 1,
        "encoder_hash_byte_group_nb_functions": ngrams.num_functions if ngrams else 0,
        "tie_word_embeddings": False,
        "use_cache": False,  # the cache of transformers fails for this model
        **special_ids(),
        "encoder_config": {
            **_stack_config(encoder, config.context, "blt_local_encoder"),
            **local,
            "cross_attn_all_layers": cross.all_layers_encoder,
        },
        "decoder_config": {
            **_stack_config(decoder, config.context, "blt_local_decoder"),
            **local,
            "cross_attn_all_layers": cross.all_layers_decoder,
        },
        "global_config": _stack_config(middle, config.context, "blt_global_transformer"),
    }


def patcher_config_of(config: Config) -> dict[str, Any]:
    """The `patcher_config` of `config.json` for a byte LM."""
    assert isinstance(config.model, ByteLMSettings)
    inner = _stack_config(config.model, config.context, "blt_patcher")
    return {**inner, "vocab_size": VOCAB_SIZE, "sliding_window": config.model.window}


def _stack_config(stack: StackSettings, context: int, kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": stack.dim,
        "num_hidden_layers": stack.num_layers,
        "num_attention_heads": stack.num_heads,
        "num_key_value_heads": stack.kv_heads,
        "intermediate_size": stack.hidden_dim,
        "hidden_act": "silu",
        "dropout": 0.0,
        "rms_norm_eps": stack.norm_eps,
        "max_position_embeddings": context,
        "rope_theta": stack.rope_theta,  # for transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": stack.rope_theta},  # for transformers 5
    }


def special_ids() -> dict[str, int]:
    return {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": BOE}
