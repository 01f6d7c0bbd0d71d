"""A token LM as `LlamaForCausalLM` and its relatives of Hugging Face transformers: `config.json`, weights, tokenizer.

Models that others made are read, too, where their blocks are those of `FAMILIES`. Their rotary embedding pairs the
first half of a head with the second, ours each even number with the next: the rows of queries and keys, and of their
biases and norms, are reordered.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bytelatent.errors import UserError
from bytelatent.model import LanguageModelSettings, TokenLMSettings
from bytelatent.model.settings import StackSettings
from bytelatent.text.tokenizer import Tokenizer
from bytelatent.weights.native import TRANSFORMERS_NAMES, SettingsTable, WeightsFormat, our_settings, their_settings
from bytelatent.weights.safetensors_io import StoredTensor, read_json_object, shown, write_json_object
from bytelatent.weights.side_files import read_sidecar, write_sidecar, write_tokenizer_config
from bytelatent.weights.stored_model import Config, StoredModel
from bytelatent.weights.transformers_config import STACK, ConfigPart, fixed_of_stack


@dataclass(frozen=True)
class Family:
    """Models of one class of transformers.

    Attributes:
        name: of the class, without ForCausalLM.
        defaults: of transformers for missing values, beside `DEFAULTS`.
        attention_bias: queries, keys and values have biases, whatever `config.json` says.
        qk_norm: queries and keys have norms.
    """

    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    attention_bias: bool = False
    qk_norm: bool = False


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096, "max_window_layers": 28}
_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
FAMILIES = {  # by model_type
    "llama": Family("Llama"),
    "mistral": Family("Mistral", _MISTRAL),
    "qwen2": Family("Qwen2", _QWEN, attention_bias=True),
    "qwen3": Family("Qwen3", {**_QWEN, "head_dim": 128}, qk_norm=True),
}
KEYS: SettingsTable = {**{key: (ours,) for key, ours in STACK.items()}, "vocab_size": ("vocab_size",)}
DEFAULTS = {  # of all families for missing values
    "max_position_embeddings": 2048,
    "intermediate_size": None,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
DEFAULT_THETA = 10_000.0
PARTS_OF_HEADS = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias", "q_norm.weight", "k_norm.weight")
ROTATED = tuple(f"self_attn.{part}" for part in PARTS_OF_HEADS)
DERIVED = "rotary_emb.inv_freq"  # older files hold it, and it follows from the settings


class LlamaFormat(WeightsFormat):
    column = TRANSFORMERS_NAMES
    loaded_by = "transformers"
    loading = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        "model = AutoModelForCausalLM.from_pretrained(FOLDER)",
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
    )

    def recognizes(self, folder: Path) -> bool:
        config = folder / "config.json"
        kind = read_json_object(config).get("model_type") if config.is_file() else None
        return isinstance(kind, str) and kind in FAMILIES

    def _their_name(self, name: str) -> str:
        return super()._their_name(name).replace("model.patcher.lm_head", "lm_head").replace("model.patcher", "model")

    def read_config(self, folder: Path) -> StoredModel:
        values, where = read_json_object(folder / "config.json"), str(folder / "config.json")
        config = read_sidecar(folder, read_llama(values, where), lambda own: read_llama(llama_config(own), where))
        words = f"transformers' {FAMILIES[values['model_type']].name}ForCausalLM"
        return StoredModel(config, {}, None, words, str(folder))

    def read_weights(self, folder: Path) -> dict[str, StoredTensor]:
        found, config = super().read_weights(folder), read_json_object(folder / "config.json")
        found = {name: tensor for name, tensor in found.items() if not name.endswith(DERIVED)}
        if config.get("tie_word_embeddings") and "model.embed_tokens.weight" in found:
            found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
        return found

    def with_tensors(self, found: StoredModel, tensors: Mapping[str, StoredTensor]) -> StoredModel:
        return super().with_tensors(found, _reordered(tensors, found.config.model, (2, -1)))

    def write_config(self, folder: Path, stored: StoredModel) -> None:
        assert stored.tokenizer is not None
        tokenizer, config = Tokenizer.read(stored.tokenizer), stored.config
        ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
        write_json_object(folder / "config.json", {**llama_config(config), **ids, "dtype": stored.precision})
        write_json_object(folder / "generation_config.json", ids)
        write_sidecar(folder, config)
        names = [tokenizer.name_of(id_) for id_ in ids.values()]
        write_tokenizer_config(folder, config.context, *names, for_chat=stored.chat_template is not None)

    def stored_tensors(self, stored: StoredModel) -> Mapping[str, StoredTensor]:
        return _reordered(super().stored_tensors(stored), stored.config.model, (-1, 2))


def _reordered(tensors: Mapping[str, StoredTensor], model: Any, shape: tuple[int, int]) -> dict[str, StoredTensor]:
    """The tensors, with the rows of each head's queries and keys, seen in this shape, transposed."""
    assert isinstance(model, StackSettings)
    order = torch.arange(model.head_dim).view(shape).T.flatten().tolist()

    def reorder(tensor: StoredTensor) -> StoredTensor:
        rows = tensor.split(1)
        heads = range(0, len(rows) - model.head_dim + 1, model.head_dim)
        return StoredTensor.join([rows[head + row] for head in heads for row in order])

    def is_rotated(name: str, tensor: StoredTensor) -> bool:
        whole_heads = len(tensor.shape) in (1, 2) and tensor.shape[0] % model.head_dim == 0 < tensor.shape[0]
        return whole_heads and name.endswith(ROTATED)

    return {name: reorder(tensor) if is_rotated(name, tensor) else tensor for name, tensor in tensors.items()}


def read_llama(values: Mapping[str, Any], where: str) -> Config:
    """The configuration of the token LM that a `config.json` describes.

    Raises:
        UserError: a value requires a computation that is not implemented.
    """
    family = FAMILIES[values.get("model_type", "llama")]
    part = ConfigPart({**DEFAULTS, **family.defaults, **values}, where=where)
    if values.get("quantization_config") is not None:
        raise UserError(f"{where}: its weights are quantized (quantization_config); take the model it was made of")
    for key in ("attention_bias", "mlp_bias"):  # with a bias of the output, too
        part.check(key, part.get(key, False), False)
    part.check_sizes()
    found = our_settings(part.resolved(DEFAULT_THETA), KEYS, where)
    size, dim, num_heads = part.get("head_dim"), found["dim"], found["num_heads"]
    if size is not None and type(size) is not int:
        raise UserError(f"{part.path('head_dim')} is {shown(repr(size))}; it should be a number")
    stack = part.stack(
        {key: value for key, value in found.items() if key != "vocab_size"},
        head_size=size if size and size * num_heads != dim else None,
        attention_bias=family.attention_bias,
        qk_norm=family.qk_norm,
        window=_window(part),
    )
    model = TokenLMSettings.parse({**stack.model_dump(), "vocab_size": found["vocab_size"]}, where)
    return Config(model=model, context=part.context)


def _window(part: ConfigPart) -> Any:
    """The positions that attention sees, the own one included; None for all.

    Raises:
        UserError: layers differ in it.
    """
    kind, window = part.get("model_type", "llama"), part.get("sliding_window")
    if kind == "mistral" or window is None:
        return window
    if kind == "llama" or not part.get("use_sliding_window", False):
        return None
    slides = [number >= part["max_window_layers"] for number in range(part["num_hidden_layers"])]
    if isinstance(kinds := part.get("layer_types"), list):
        slides = [kind != "full_attention" for kind in kinds]
    if any(slides) and not all(slides):
        raise UserError(f"{part.path('sliding_window')}: some layers have it and others none, which is not known here")
    return window if all(slides) else None


def llama_config(config: Config) -> dict[str, Any]:
    """`config.json` for a token LM: of a Llama, or of a Qwen where queries and keys have biases or norms.

    Raises:
        UserError: none of them computes this.
    """
    model = config.model
    assert isinstance(model, LanguageModelSettings)
    if model.window is not None:
        raise UserError(
            f"hf: a Llama sees the whole document, and this model a window of {model.window} ids; keep it in our format"
        )
    if model.attention_bias and model.qk_norm:
        raise UserError("hf: Qwen2 has biases and Qwen3 has q/k norms, and this model both; keep it in our format")
    kind = "qwen2" if model.attention_bias else "qwen3" if model.qk_norm else "llama"
    return {
        "architectures": [f"{FAMILIES[kind].name}ForCausalLM"],
        "model_type": kind,
        **their_settings(model, KEYS, "hf"),
        **fixed_of_stack(model, config.context),
        "rope_theta": model.rope_theta,
        "head_dim": model.head_dim,
        **({} if kind == "qwen2" else {"attention_bias": False}),
        **({"mlp_bias": False} if kind == "llama" else {"use_sliding_window": False, "sliding_window": None}),
        "tie_word_embeddings": False,
    }
