"""Between the `config.json` of `BltForCausalLM` and our settings: how it is read, checked and written."""

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Part:
    """A part of a `config.json`, with the defaults of transformers.

    Attributes:
        name: the key of the part; empty for the top level.
        where: the file, for errors.
    """

    name: str
    values: Mapping[str, Any]
    where: str

    @classmethod
    def of(cls, values: Mapping[str, Any], name: str, where: str) -> "_Part":
        """A part below the top level, with its sizes checked."""
        part = cls(name, {**DEFAULTS[name], **cls("", values, where).group(name)}, where)
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            value = part.values[key]
            if not (type(value) is int and value > 0) and not (value is None and key == "intermediate_size"):
                raise UserError(f"{part.path(key)} is {shown(repr(value))}; it should be a number above 0")
        return part

    def path(self, key: str) -> str:
        return f"{self.where}: {self.name}.{key}" if self.name else f"{self.where}: {key}"

    def check(self, key: str, value: Any, *allowed: Any) -> None:
        """Refuse a value that asks for other mathematics."""
        if value not in allowed:
            raise UserError(f"{self.path(key)} is {shown(repr(value))}; only {shown(repr(allowed[0]))} is known here")

    def group(self, key: str) -> dict[str, Any]:
        """The keys and values under a key; none if it is absent."""
        found = self.values.get(key)
        if found is not None and not isinstance(found, dict):
            raise UserError(f"{self.path(key)} is {shown(repr(found))}; it should be a mapping of keys to values")
        return found or {}

    @property
    def heads(self) -> dict[str, int]:
        heads = self.values["num_attention_heads"]
        return {"num_attention_heads": heads, "num_key_value_heads": self.values.get("num_key_value_heads") or heads}

    @property
    def context(self) -> int:
        """The context in training, in ids."""
        key = "max_position_embeddings"
        found = self.values[key]
        if type(found) is not int or not 1 <= found <= LONGEST_CONTEXT:
            raise UserError(
                f"{self.path(key)} is {shown(repr(found))}; it should be a number from 1 to {LONGEST_CONTEXT:,}"
            )
        return found

    def stack(self, window: int | None, default_theta: float = DEFAULT_THETA) -> StackSettings:
        self.check("hidden_act", self.values.get("hidden_act", "silu"), "silu")
        dim = self.values["hidden_size"]
        head_dim = dim // self.values["num_attention_heads"]
        self.check("head_dim", self.values.get("head_dim") or head_dim, head_dim)
        values = {
            "dim": dim,
            "num_layers": self.values["num_hidden_layers"],
            "num_heads": self.values["num_attention_heads"],
            "num_kv_heads": self.values.get("num_key_value_heads"),
            "window": window,
            "rope_theta": self.rope_theta(default_theta),
            "norm_eps": self.values.get("rms_norm_eps", 1e-5),
            **_width(dim, self.values["intermediate_size"] or 8 * dim // 3),
        }
        return StackSettings.parse(values, f"{self.where}: {self.name}")

    def rope_theta(self, default: float) -> float:
        """The theta of the rotary embedding.

        transformers 5 reads `rope_scaling`, else `rope_parameters`, and `rope_theta` only if these name no theta.
        transformers 4 reads `rope_theta` and the type in `rope_scaling`.

        Raises:
            UserError: it is not the default type, or the two versions of transformers would read another theta.
        """
        alone = self.values.get("rope_theta", default)
        found = {"rope_theta": alone} if "rope_theta" in self.values else {}
        found |= {key: rope.get("rope_theta", alone) for key, rope in self.plain_rope().items() if rope}
        first = next(iter(found.values()), default)
        if any(theta != first for theta in found.values()):
            thetas = ", ".join(f"{self.name}.{key} says {shown(repr(theta))}" for key, theta in found.items())
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
        self.check("partial_rotary_factor", self.values.get("partial_rotary_factor", 1.0), 1.0, None)
        return found


def read_model(values: Mapping[str, Any], where: str) -> Config:
    """The configuration of the BLT that a `config.json` describes.

    Raises:
        UserError: a value asks for other mathematics than is implemented here.
    """
    top = _Part("", {**DEFAULTS[""], **values}, where)
    encoder, middle, decoder = (_Part.of(values, f"{part}_config", where) for part in ("encoder", "global", "decoder"))
    k, window = top.values["cross_attn_k"], top.values["local_attention_window_len"]
    _Part("", values, where).plain_rope()  # transformers ignores it at the top level, but its author meant it
    top.check("tie_word_embeddings", top.values["tie_word_embeddings"], False)
    for part in (top, encoder, decoder):
        part.check("vocab_size", part.values.get("vocab_size", VOCAB_SIZE), VOCAB_SIZE)
        part.check("cross_attn_k", part.values["cross_attn_k"], k)
    decoder.check("hidden_size_global", decoder.values["hidden_size_global"], middle.values["hidden_size"])
    for key, heads in decoder.heads.items():
        # In transformers, a cross-attention has as many heads as its part; here both cross-attentions have the same.
        decoder.check(key, heads, encoder.heads[key])
    if encoder.values["cross_attn_all_layers"] and encoder.values["num_hidden_layers"] > 1:
        raise UserError(
            f"{where}: encoder_config.cross_attn_all_layers is true with {encoder.values['num_hidden_layers']} layers; "
            "transformers then pools again after each layer and the published model does not, so it is not clear what "
            "these weights mean. If they were converted from published weights, convert those instead"
        )
    functions = top.values["encoder_hash_byte_group_nb_functions"]
    ngrams = {
        "sizes": values.get("encoder_hash_byte_group_size") or [3, 4, 5, 6, 7, 8],
        "num_functions": functions,
        "vocab_size": top.values["encoder_hash_byte_group_vocab"],
        "stop_at_document": False,
    }
    model = {
        "encoder": encoder.stack(window),
        "global_transformer": middle.stack(None),
        "decoder": decoder.stack(window),
        "cross_attention": {
            "k": k,
            "num_heads": encoder.values["num_attention_heads"],
            "num_kv_heads": encoder.values.get("num_key_value_heads"),
            "all_layers_encoder": encoder.values["cross_attn_all_layers"],
            "all_layers_decoder": decoder.values["cross_attn_all_layers"],
        },
        "ngram_hash": ngrams if functions else None,
    }
    patching = {"mode": "byte", "max_patch_length": top.values["max_patch_length"]}
    if top.values["patching_mode"] == "entropy":  # in all other modes, transformers makes each byte a patch
        patching |= {"mode": "entropy", "threshold": top.values["patching_threshold"]}
        if top.values["patch_size"] is None:
            raise UserError(
                f"{where}: patch_size is None; transformers then makes each byte a patch: say patching_mode 'byte'"
            )
    return Config(
        model=BLTSettings.parse(model, where),
        context=top.context,
        patching=PatchSettings.parse(patching, where=where),
    )


def read_byte_lm(values: Mapping[str, Any], where: str) -> Config | None:
    """The configuration of the patcher, which is a byte LM; None if the model has no patcher.

    Raises:
        UserError: a value asks for other mathematics than is implemented here.
    """
    if not {**DEFAULTS[""], **values}["patch_in_forward"]:
        return None
    patcher = _Part.of(values, "patcher_config", where)
    patcher.check("vocab_size", patcher.values.get("vocab_size", VOCAB_SIZE), VOCAB_SIZE)
    stack = patcher.stack(patcher.values["sliding_window"], DEFAULT_PATCHER_THETA)
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
