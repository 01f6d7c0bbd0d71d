"""A token LM as `LlamaForCausalLM` of Hugging Face transformers: `config.json`, weights, and the tokenizer.

Any folder of a Llama without biases and with the plain rotary embedding is read, too. Its rotary embedding pairs the
first half of a head with the second, ours each even number with the next: the rows of queries and keys are reordered.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bytelatent.errors import UserError
from bytelatent.model import LanguageModelSettings, TokenLMSettings
from bytelatent.model.settings import StackSettings
from bytelatent.text.tokenizer import Tokenizer
from bytelatent.weights.hugging_face import STACK, Part, fixed_of_stack
from bytelatent.weights.native import TRANSFORMERS_NAMES, SettingsTable, WeightsFormat, our_settings, their_settings
from bytelatent.weights.safetensors_io import StoredTensor, read_json_object, write_json_object
from bytelatent.weights.side_files import read_sidecar, write_sidecar, write_tokenizer_config
from bytelatent.weights.stored_model import Config, StoredModel

KEYS: SettingsTable = {**{key: (ours,) for key, ours in STACK.items()}, "vocab_size": ("vocab_size",)}
DEFAULTS = {"max_position_embeddings": 2048, "intermediate_size": None, "tie_word_embeddings": False}  # if missing
DEFAULT_THETA = 10_000.0
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")


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
        return config.is_file() and read_json_object(config).get("model_type") == "llama"

    def _their_name(self, name: str) -> str:
        return super()._their_name(name).replace("model.patcher.lm_head", "lm_head").replace("model.patcher", "model")

    def read_config(self, folder: Path) -> StoredModel:
        values, where = read_json_object(folder / "config.json"), str(folder / "config.json")
        config = read_sidecar(folder, read_llama(values, where), lambda own: read_llama(llama_config(own), where))
        return StoredModel(config, {}, None, "transformers' LlamaForCausalLM", str(folder))

    def read_weights(self, folder: Path) -> dict[str, StoredTensor]:
        found, config = super().read_weights(folder), read_json_object(folder / "config.json")
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
        whole_heads = len(tensor.shape) == 2 and tensor.shape[0] % model.head_dim == 0 < tensor.shape[0]
        return whole_heads and name.endswith(tuple(f"{part}.weight" for part in ROTATED))

    return {name: reorder(tensor) if is_rotated(name, tensor) else tensor for name, tensor in tensors.items()}


def read_llama(values: Mapping[str, Any], where: str) -> Config:
    """The configuration of the token LM that a `config.json` describes.

    Raises:
        UserError: a value requires a computation that is not implemented.
    """
    part = Part({**DEFAULTS, **values}, where=where)
    for key in ("attention_bias", "mlp_bias"):
        part.check(key, part.get(key, False), False)
    part.check_sizes()
    found = our_settings(part.resolved(DEFAULT_THETA), KEYS, where)
    stack = part.stack({key: value for key, value in found.items() if key != "vocab_size"})
    model = TokenLMSettings.parse({**stack.model_dump(), "vocab_size": found["vocab_size"]}, where)
    return Config(model=model, context=part.context)


def llama_config(config: Config) -> dict[str, Any]:
    """`config.json` for a token LM.

    Raises:
        UserError: a Llama computes something else.
    """
    model = config.model
    assert isinstance(model, LanguageModelSettings)
    if model.window is not None:
        raise UserError(
            f"hf: a Llama sees the whole document, and this model a window of {model.window} ids; keep it in our format"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **their_settings(model, KEYS, "hf"),
        **fixed_of_stack(model, config.context),
        "rope_theta": model.rope_theta,
        "head_dim": model.head_dim,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
