"""The format of `BltForCausalLM` in Hugging Face transformers: `config.json`, `model.safetensors` (or shards), a
tokenizer. Its patcher is the byte LM.

Models for which transformers computes something else than the published model are refused by name: those with encoder
cross-attention after each of several layers (transformers pools again at each and keeps only the last), and those with
other patching than the plain entropy mode and `byte`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from bytelatent.errors import UserError
from bytelatent.model import BLTSettings
from bytelatent.vocab import BOE, BOS, BPE_DELIMITER, EOS, OFFSET
from bytelatent.weights.hugging_face_config import (
    MODES,
    config_of,
    patcher_config_of,
    read_byte_lm,
    read_model,
    special_ids,
)
from bytelatent.weights.native import LOADING
from bytelatent.weights.safetensors_io import StoredTensor, read_json, read_weights, write_json, write_weights
from bytelatent.weights.stored_model import Advance, Config, StoredModel, WeightsFormat
from bytelatent.weights.translation import (
    Described,
    TensorNames,
    read_sidecar,
    to_our_names,
    to_their_names,
    write_sidecar,
)

BYTE_LM_SIDECAR = "bytelatent.byte_lm.json"
PATCHER = "model.patcher."
NO_TABLES = "model.encoder_hash_tok_embedding.weight"  # empty in a model without n-gram hashes

NAMES = TensorNames(
    layers={
        "encoder.stack.blocks": "model.local_encoder.layers",
        "encoder.cross_attention": "model.local_encoder.cross_attn_layers",
        "global_transformer.stack.blocks": "model.global_transformer.layers",
        "decoder.stack.blocks": "model.local_decoder.layers",
        "decoder.cross_attention": "model.local_decoder.cross_attn_layers",
        "stack.blocks": "model.patcher.layers",
    },
    in_layer={
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.down": "mlp.down_proj",
        "feed_forward.up": "mlp.up_proj",
        # of a cross-attention
        "query_norm": "q_norm",
        "key_value_norm": "k_norm",
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "output": "o_proj",
    },
    others={
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
    },
)


def is_hugging_face(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") == "blt"


def _read_config(folder: Path) -> StoredModel:
    """A BLT, with its patcher as the byte LM.

    Raises:
        UserError: a value is missing, or asks for other mathematics than is implemented here.
    """
    values, where = read_json(folder / "config.json"), str(folder / "config.json")
    found = read_model(values, where)

    def described(own: Config) -> Described:
        again = read_model(config_of(own, has_byte_lm=True), where)
        return again.model, again.patching, again.context

    def byte_lm_described(own: Config) -> Described:
        again = read_byte_lm({"patcher_config": patcher_config_of(own)}, where)
        assert again is not None
        return again.model, None, again.context

    config = read_sidecar(folder, found, described)
    inner = read_byte_lm(values, where)
    words = "transformers' BltForCausalLM"
    if inner is None:
        return StoredModel(config, {}, None, words, str(folder))
    inner = read_sidecar(folder, inner, byte_lm_described, BYTE_LM_SIDECAR)
    return StoredModel(config, {}, StoredModel(inner, {}, None, words, str(folder)), words, str(folder))


def _read_tensors(found: StoredModel) -> StoredModel:
    tensors = read_weights(Path(found.source))
    if NO_TABLES in tensors and tensors[NO_TABLES].shape[:1] == (0,):
        tensors.pop(NO_TABLES)
    byte_lm = found.byte_lm
    if byte_lm is not None:
        patcher = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PATCHER)}
    model = to_our_names(tensors, found.config.model, NAMES.of, found.source)
    if byte_lm is not None:
        byte_lm = replace(byte_lm, tensors=to_our_names(patcher, byte_lm.config.model, NAMES.of, found.source))
    return replace(found, tensors=model, byte_lm=byte_lm)


def write_hugging_face(folder: Path, stored: StoredModel, advance: Advance = lambda num_bytes: None) -> None:
    """Write a BLT with its byte LM, for `BltForCausalLM` and `AutoTokenizer`.

    Raises:
        UserError: transformers would compute something else, or the byte LM of an entropy model is missing.
    """
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
    tensors = to_their_names(stored.tensors, NAMES.of(config.model))
    if config.model.ngram_hash is None:
        tensors[NO_TABLES] = StoredTensor(next(iter(tensors.values())).dtype, (0, config.model.encoder.dim), ())
    write_sidecar(folder, config)
    if byte_lm is not None:
        values["patcher_config"] = patcher_config_of(byte_lm.config)
        tensors |= to_their_names(byte_lm.tensors, NAMES.of(byte_lm.config.model))
        write_sidecar(folder, byte_lm.config, BYTE_LM_SIDECAR)
    precisions = {str(tensor.dtype).removeprefix("torch.") for tensor in stored.tensors.values()}
    values["dtype"] = precisions.pop() if len(precisions) == 1 else "float32"
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", {**special_ids(), "use_cache": False, "do_sample": False})
    write_tokenizer(folder, config.context)
    write_weights(folder, tensors, advance=advance)


HUGGING_FACE = WeightsFormat(
    title="for transformers",
    recognizes=is_hugging_face,
    read_config=_read_config,
    read_tensors=_read_tensors,
    write=write_hugging_face,
    modes=MODES,
    loaded_by="transformers",
    loading=(
        "from transformers import AutoTokenizer, BltForCausalLM",
        "",
        "model = BltForCausalLM.from_pretrained(FOLDER)",
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        "# Batch texts of one length only: transformers reads padding as text. Version 4 has no attention windows.",
        "",
        "# or, many times faster:",
        *LOADING,
    ),
)


SPECIAL_TOKENS = {"<boe>": BOE, "<s>": BOS, "</s>": EOS, "<bpe_delimiter>": BPE_DELIMITER}


def write_tokenizer(folder: Path, context: int) -> None:
    """Write a byte-level tokenizer without merges for `AutoTokenizer`: a text becomes BOS and its bytes.

    It has no padding token and so refuses to pad: the patcher and the global transformer of `BltForCausalLM` do not
    mask padding, and would silently read it as text.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # the text <s> means these three bytes
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for name, values in (("tokenizer.json", _tokenizer()), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")


def _tokenizer() -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    added = [
        {
            "id": number,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for content, number in SPECIAL_TOKENS.items()
    ]
    letters = _letters()
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": SPECIAL_TOKENS | {letters[byte]: byte + OFFSET for byte in range(256)},
            "merges": [],
        },
    }


def _letters() -> list[str]:
    """The letter of each byte in a byte-level vocabulary.

    Bytes that are printable characters in Latin-1 have these as letters, the others the characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]
