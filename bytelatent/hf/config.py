"""The configuration of a BLT for transformers: our `config.json` and the entropy model's settings."""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig  # pyright: ignore[reportMissingImports]

from bytelatent.errors import UserError
from bytelatent.model import BLTSettings, ByteLMSettings, preset
from bytelatent.model.settings import NAMES
from bytelatent.patching import PatchSettings
from bytelatent.vocab import BOE, BOS, EOS, VOCAB_SIZE
from bytelatent.weights import Config, StoredModel, open_pretrained

# Of `from_pretrained`: how a model is found. All else are settings of the model, or of transformers.
FINDING = ("entropy_model", "revision", "token", "local_files_only")
OF_AUTO = ("_from_auto", "_commit_hash", "code_revision", "trust_remote_code", "cache_dir", "force_download", "proxies")
# Arguments of transformers' `from_pretrained` that change nothing here.
WITHOUT_EFFECT = {
    *OF_AUTO,
    *("low_cpu_mem_usage", "use_safetensors", "weights_only", "adapter_kwargs", "attn_implementation", "variant"),
    *("ignore_mismatched_sizes", "output_loading_info", "offload_folder", "max_memory", "use_cache", "return_dict"),
}
ARCHITECTURES = ["BytelatentForCausalLM"]


class BytelatentConfig(PretrainedConfig):
    """Everything that `config.json` of our format holds, as plain values, and the entropy model's settings.

        BytelatentConfig(model="demo-blt", patching={"mode": "space"}, context=512)

    Args:
        model: settings of the network, or the name of a preset.
        patching: patching settings.
        context: context of the training, in ids.
        entropy_model: settings of the byte LM that finds patches, or the name of a preset, where patches need one.
        more: `calibration` and `origin` as in `config.json`, and what transformers knows.

    Raises:
        UserError: a setting is not valid.
    """

    model_type = "bytelatent"
    attribute_map = {"max_position_embeddings": "context"}  # noqa: RUF012  # transformers reads it by this name
    auto_map = {}  # noqa: RUF012  # no code comes with a model; TRL asks
    has_no_defaults_at_init = True

    def __init__(
        self,
        model: Any = "demo-blt",
        patching: Any = None,
        context: int = 1024,
        entropy_model: Any = None,
        **more: Any,
    ):
        ours = {name: more.pop(name) for name in Config.model_fields if name in more}
        model = preset(model) if isinstance(model, str) else model
        entropy_model = preset(entropy_model) if isinstance(entropy_model, str) else entropy_model
        patching = {"mode": "space"} if patching is None else patching
        given = {"model": _plain(model), "patching": _plain(patching), "context": context}
        config = Config.parse({**ours, **given}, "BytelatentConfig")
        for name, value in config.shown().items():
            setattr(self, name, value)
        self.entropy_model = None
        if entropy_model is not None:
            self.entropy_model = ByteLMSettings.parse(_plain(entropy_model), "entropy_model").plain()
        self.vocab_size = VOCAB_SIZE
        more.pop("vocab_size", None)
        ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": BOE}
        super().__init__(**{**ids, "tie_word_embeddings": False, "architectures": ARCHITECTURES, **more})

    @classmethod
    def from_pretrained(cls, source: str | Path, return_unused_kwargs: bool = False, **more: Any) -> Any:
        """The configuration of any model that `BLT.from_pretrained` takes, without its weights.

        Args:
            more: `entropy_model`, `revision`, `token` and `local_files_only` as there; others replace values of the
                configuration.
            return_unused_kwargs: also return those of `more` that are no values of the configuration.
        """
        finding = found_by(source, more)
        found = open_pretrained(source, **finding, weights=False)
        config = cls.of(found)
        config.name_or_path = str(source)
        unused = {name: finding[name] for name in ("entropy_model",) if name in finding}  # the model needs it again
        for name, value in more.items():
            if name in ("name_or_path", *OF_AUTO):
                continue
            if hasattr(config, name) and name not in ("dtype", "torch_dtype"):  # those are of the weights
                setattr(config, name, _plain(value))
            else:
                unused[name] = value
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def of(cls, found: StoredModel) -> "BytelatentConfig":
        """The configuration of a model on disk.

        Raises:
            UserError: it is no BLT.
        """
        if not isinstance(found.config.model, BLTSettings) or found.config.patching is None:
            name = NAMES[found.config.model.kind]
            raise UserError(f"model: '{found.source}' holds a {name} without patches; name a BLT")
        entropy_model = found.byte_lm.config.model.plain() if found.byte_lm is not None else None
        return cls(**found.config.shown(), entropy_model=entropy_model)

    def ours(self) -> Config:
        """The values as our own settings.

        Raises:
            UserError: one is not valid.
        """
        return Config.parse(
            {name: getattr(self, name) for name in Config.model_fields if hasattr(self, name)}, "config"
        )

    @property
    def hidden_size(self) -> int:
        """Width of the global transformer."""
        return self.model["global_transformer"]["dim"]

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the global transformer."""
        return self.model["global_transformer"]["num_layers"]

    @property
    def num_attention_heads(self) -> int:
        """Heads of the global transformer."""
        return self.model["global_transformer"]["num_heads"]


def found_by(source: str | Path, given: dict[str, Any]) -> dict[str, Any]:
    """Takes what says how to find a model out of the arguments of a `from_pretrained`."""
    finding = {name: given.pop(name) for name in FINDING if name in given}
    if inner := given.pop("subfolder", None):
        raise UserError(f"subfolder: '{inner}'; models lie at the top of a folder or repository; name that")
    if Path(source).is_dir() or finding.get("revision") is None:  # transformers passes its default, `main`
        finding.pop("revision", None)
    if not isinstance(finding.get("token"), str):  # True: the key of `hf auth login`, as always here
        finding.pop("token", None)
    if finding.get("entropy_model", "") is None or isinstance(finding.get("entropy_model"), dict):
        finding.pop("entropy_model")  # a configuration's own
    return finding


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, BLTSettings | ByteLMSettings | PatchSettings) else value


def is_unknown(name: str, value: Any) -> bool:
    """Whether an argument of `from_pretrained` asks for something that is not known here."""
    return value is not None and value is not False and name[0] != "_" and name not in WITHOUT_EFFECT


def one_device(device_map: Any) -> Any:
    """The device of a `device_map`.

    Raises:
        UserError: it names several.
    """
    if device_map is None:
        return "cpu"
    if isinstance(device_map, dict):
        if len(places := {str(place) for place in device_map.values()}) != 1:
            raise UserError(f"device_map: a BLT is on one device, not on {', '.join(sorted(places))}; name one")
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, int):
        return f"cuda:{device_map}"
    return "auto" if device_map in ("auto", "balanced", "sequential", "balanced_low_0") else device_map
