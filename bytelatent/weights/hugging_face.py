"""The format of `BltForCausalLM` in Hugging Face transformers: `config.json`, `model.safetensors` (or shards), a
tokenizer. Its patcher is the byte LM.

Where transformers computes something else than the published model, a model that would differ is refused by name:
encoder cross-attention after each of several layers (it pools anew at each and keeps only the last), rules but the
plain entropy rule and `byte`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from bytelatent.errors import UserError
from bytelatent.model import ByteLMSettings, ModelSettings
from bytelatent.weights.beside import Expressed, recall, remember
from bytelatent.weights.hugging_face_config import (
    DEFAULTS,
    byte_lm_of,
    config_of,
    context_of,
    patcher_config_of,
    settings_of,
    special_ids,
)
from bytelatent.weights.safetensors_io import StoredTensor, read_json, read_weights, write_json, write_weights
from bytelatent.weights.stored_model import Config, StoredModel, shapes, under_our_names, under_their_names
from bytelatent.weights.tokenizer import write_tokenizer

BYTE_LM_BESIDE = "bytelatent.byte_lm.json"

BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.down": "mlp.down_proj",
    "feed_forward.up": "mlp.up_proj",
}
CROSS_ATTENTION = {
    "query_norm": "q_norm",
    "key_value_norm": "k_norm",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
}
PLACES = [  # ours, theirs, what stands there by number
    ("encoder.stack.blocks.", "model.local_encoder.layers.", BLOCK),
    ("encoder.cross_attention.", "model.local_encoder.cross_attn_layers.", CROSS_ATTENTION),
    ("global_transformer.stack.blocks.", "model.global_transformer.layers.", BLOCK),
    ("decoder.stack.blocks.", "model.local_decoder.layers.", BLOCK),
    ("decoder.cross_attention.", "model.local_decoder.cross_attn_layers.", CROSS_ATTENTION),
    ("stack.blocks.", "model.patcher.layers.", BLOCK),
]
ALONE = {
    "embedding": "model.patcher.embed_tokens",
    "norm": "model.patcher.norm",
    "output": "model.patcher.lm_head",
    "encoder.embedding": "model.local_encoder.embed_tokens",
    "encoder.ngram_hash.tables": "model.encoder_hash_tok_embedding",
    "encoder.pooled_to_queries": "model.local_encoder.patch_embedding_projection",
    "global_transformer.projection": "model.global_transformer.token_embedding_projection",
    "decoder.patch_to_keys": "model.local_decoder.patch_embedding_projection",
    "decoder.norm": "model.local_decoder.norm",
    "decoder.output": "lm_head",
}
PATCHER = "model.patcher."
NO_TABLES = "model.encoder_hash_tok_embedding.weight"  # empty in a model without n-gram hashes


def is_hugging_face(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") == "blt"


def open_hugging_face(folder: Path, weights: bool = True) -> StoredModel:
    """A BLT in the format of transformers, and its patcher as the byte LM.

    Raises:
        UserError: something is missing, or changes the mathematics to what is not known here.
    """
    values = read_json(folder / "config.json")
    where = str(folder / "config.json")
    model, patching = settings_of(values, where)
    config = Config(model=model, context=context_of({**DEFAULTS[""], **values}, where), patching=patching)
    config = recall(folder, config, lambda earlier: (*settings_of(config_of(earlier, True), where), earlier.context))
    inner = byte_lm_of(values, where)
    if inner is not None:
        inner = recall(folder, inner, lambda earlier: _byte_lm_again(earlier, where), BYTE_LM_BESIDE)
    tensors: Mapping[str, StoredTensor] = {}
    patcher: Mapping[str, StoredTensor] = {}
    if weights:
        tensors, patcher = _read_tensors(folder, model, inner.model if inner else None)
    words = "transformers' BltForCausalLM"
    byte_lm = StoredModel(inner, patcher, None, words, str(folder)) if inner is not None else None
    return StoredModel(config, tensors, byte_lm, words, str(folder))


def write_hugging_face(
    folder: Path, stored: StoredModel, advance: Callable[[int], None] = lambda num_bytes: None
) -> None:
    """Write a BLT with its byte LM into an existing folder, for `BltForCausalLM` and `AutoTokenizer`.

    Raises:
        UserError: transformers would compute something else, or the byte LM that its rule needs is missing.
    """
    config, byte_lm = stored.config, stored.byte_lm
    if isinstance(config.model, ByteLMSettings):
        raise UserError(
            "hf: transformers has no class for a byte LM alone; convert it together with its BLT, or to meta"
        )
    assert config.patching is not None
    if config.patching.needs_entropies and byte_lm is None:
        raise UserError("hf: the rule 'entropy' needs the byte LM in the same folder; name it: --entropy FOLDER")
    values = config_of(config, byte_lm is not None)
    tensors = under_their_names(stored.tensors, published_names(config.model))
    if config.model.ngram_hash is None:
        some = next(iter(tensors.values()))
        tensors[NO_TABLES] = StoredTensor(some.dtype, (0, config.model.encoder.dim), ())
    remember(folder, config)
    if byte_lm is not None:
        assert isinstance(byte_lm.config.model, ByteLMSettings)
        values["patcher_config"] = patcher_config_of(byte_lm.config)
        tensors |= under_their_names(byte_lm.tensors, published_names(byte_lm.config.model))
        remember(folder, byte_lm.config, BYTE_LM_BESIDE)
    precisions = {str(tensor.dtype).removeprefix("torch.") for tensor in stored.tensors.values()}
    values["dtype"] = precisions.pop() if len(precisions) == 1 else "float32"
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", {**special_ids(), "use_cache": False, "do_sample": False})
    write_tokenizer(folder, config.context)
    write_weights(folder, tensors, advance=advance)


def published_names(settings: ModelSettings) -> dict[str, list[str]]:
    """For each of our tensors the one it is in transformers."""
    return {name: [_published(name)] for name in shapes(settings)}


def _published(name: str) -> str:
    path, _, kind = name.rpartition(".")
    for ours, theirs, inside in PLACES:
        if path.startswith(ours):
            number, _, rest = path.removeprefix(ours).partition(".")
            return f"{theirs}{number}.{inside[rest]}.{kind}"
    return f"{ALONE[path]}.{kind}"


def _read_tensors(
    folder: Path, model: ModelSettings, byte_lm: ModelSettings | None
) -> tuple[Mapping[str, StoredTensor], Mapping[str, StoredTensor]]:
    found = read_weights(folder)
    if NO_TABLES in found and found[NO_TABLES].shape[:1] == (0,):
        found.pop(NO_TABLES)
    if byte_lm is None:
        return under_our_names(found, model, published_names, str(folder)), {}
    patcher = {name: tensor for name, tensor in found.items() if name.startswith(PATCHER)}
    others = {name: tensor for name, tensor in found.items() if name not in patcher}
    return (
        under_our_names(others, model, published_names, str(folder)),
        under_our_names(patcher, byte_lm, published_names, str(folder)),
    )


def _byte_lm_again(config: Config, where: str) -> Expressed:
    """What is left of a byte LM's settings that are written and read again."""
    again = byte_lm_of({"patcher_config": patcher_config_of(config)}, where)
    assert again is not None
    return again.model, None, again.context
