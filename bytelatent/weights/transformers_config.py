"""A part of a `config.json` of Hugging Face transformers: the shape of a stack, and its rotary embedding."""

from collections.abc import Mapping
from typing import Any

from bytelatent.errors import UserError
from bytelatent.model.settings import LONGEST_CONTEXT, StackSettings
from bytelatent.weights.safetensors_io import shown

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
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


ROPE_TYPES = ("default", "llama3")
SCALING = {  # the keys of a rotary embedding of type llama3, and those of `RopeScaling`
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_context",
}


class ConfigPart(dict[str, Any]):
    """The values of a part of a `config.json`; the top level has no name."""

    def __init__(self, values: Mapping[str, Any], name: str = "", where: str = ""):
        super().__init__(values)
        self.where, self.name = where, name

    def path(self, key: str) -> str:
        return f"{self.where}: {self.name}.{key}" if self.name else f"{self.where}: {key}"

    def check(self, key: str, value: Any, *allowed: Any) -> None:
        """Refuse a value that requires a computation that is not implemented."""
        if value not in allowed:
            known = [shown(repr(one)) for one in allowed if one is not None or len(allowed) == 1]
            words = f"{' and '.join(known)} {'is' if len(known) == 1 else 'are'} known here"
            raise UserError(f"{self.path(key)} is {shown(repr(value))}; only {words}")

    def group(self, key: str) -> dict[str, Any]:
        """The keys and values under a key; empty if it is absent."""
        found = self.get(key)
        if found is not None and not isinstance(found, dict):
            raise UserError(f"{self.path(key)} is {shown(repr(found))}; it should be a mapping of keys to values")
        return found or {}

    def part(self, name: str, defaults: Mapping[str, Any]) -> "ConfigPart":
        """The part under a key, with transformers' values for missing ones."""
        part = ConfigPart({**defaults, **self.group(name)}, name, self.where)
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

    def resolved(self, default_theta: float) -> dict[str, Any]:
        """All values, with those that follow from others."""
        return {
            "rms_norm_eps": 1e-5,
            **self,
            "num_key_value_heads": self.get("num_key_value_heads") or self["num_attention_heads"],
            "intermediate_size": self["intermediate_size"] or 8 * self["hidden_size"] // 3,
            "rope_theta": self.rope_theta(default_theta),
        }

    def stack(self, values: dict[str, Any], **more: Any) -> StackSettings:
        """The settings of a stack from its values by `STACK`, and those that `STACK` lacks."""
        head_dim = more.get("head_size") or values["dim"] // values["num_heads"]
        self.check("hidden_act", self.get("hidden_act", "silu"), "silu")
        self.check("head_dim", self.get("head_dim") or head_dim, head_dim)
        width = _width(values["dim"], values.pop("hidden_dim"))
        values |= {
            "num_kv_heads": self.get("num_key_value_heads"),
            "rope_scaling": self.rope_scaling(),
            **width,
            **more,
        }
        del values["kv_heads"]
        return StackSettings.parse(values, ": ".join(filter(None, (self.where, self.name))))

    def rope_theta(self, default: float) -> float:
        """The theta of the rotary embedding.

        transformers 5 reads `rope_scaling`, else `rope_parameters`, and `rope_theta` only if these name no theta.
        transformers 4 reads `rope_theta` and the type in `rope_scaling`.

        Raises:
            UserError: its type is unknown, or the two versions of transformers would read another theta.
        """
        alone = self.get("rope_theta", default)
        found = {"rope_theta": alone} if "rope_theta" in self else {}
        found |= {key: rope.get("rope_theta", alone) for key, rope in self.rope(*ROPE_TYPES).items() if rope}
        first = next(iter(found.values()), default)
        if any(theta != first for theta in found.values()):
            thetas = ", ".join(f"{self.name}.{key} = {shown(repr(theta))}" for key, theta in found.items())
            raise UserError(
                f"{self.where}: the rotary theta is not clear: {thetas}; which one counts depends on the version of "
                "transformers, so let them agree"
            )
        return first

    def rope_scaling(self) -> dict[str, Any] | None:
        """The scaling of the rotary embedding, by the names of `RopeScaling`."""
        found = {key: rope for key, rope in self.rope(*ROPE_TYPES).items() if rope}
        scalings = []
        for key, rope in found.items():
            if _rope_type(rope) == "default":
                scalings.append(None)
                continue
            if missing := [name for name in SCALING if name not in rope]:
                raise UserError(f"{self.path(key)} lacks {missing[0]}, which rope_type 'llama3' needs; fetch it again")
            scalings.append({ours: rope[theirs] for theirs, ours in SCALING.items()})
        if any(scaling != scalings[0] for scaling in scalings):
            raise UserError(f"{self.where}: {self.name}.rope_scaling and rope_parameters differ; let them agree")
        return scalings[0] if scalings else None

    def rope(self, *types: str) -> dict[str, dict[str, Any]]:
        """The settings of the rotary embedding by either name; its type must be one of these."""
        found = {key: self.group(key) for key in ("rope_scaling", "rope_parameters")}
        for key, rope in found.items():
            self.check(f"{key}.rope_type", _rope_type(rope), *types)
            self.check(f"{key}.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0, None)
            if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
                raise UserError(f"{self.path(key)}.{shown(nested[0])}: settings by kind of layer are not known here")
        self.check("partial_rotary_factor", self.get("partial_rotary_factor", 1.0), 1.0, None)
        return found


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _width(dim: int, hidden: int) -> dict[str, Any]:
    """`multiple_of` and `ffn_dim_multiplier` that give this feed-forward width."""
    base = int(2 * 4 * dim / 3)
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if -(-base // multiple) * multiple == hidden:
            return {"multiple_of": multiple}
    return {"multiple_of": 1, "ffn_dim_multiplier": (hidden + 0.5) / base}


def fixed_of_stack(stack: StackSettings, context: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": stack.rope_theta}
    if stack.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **{key: getattr(stack.rope_scaling, ours) for key, ours in SCALING.items()}}
    return {
        "hidden_act": "silu",
        "dropout": 0.0,
        "max_position_embeddings": context,
        # transformers 4 reads rope_theta, and the scaling by its older name alone.
        "rope_parameters" if stack.rope_scaling is None else "rope_scaling": rope,
    }
