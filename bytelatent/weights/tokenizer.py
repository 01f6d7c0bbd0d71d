"""Bytes to ids and back for `transformers.AutoTokenizer`: a byte-level vocabulary without merges."""

import json
from pathlib import Path
from typing import Any

from bytelatent.vocab import BOE, BOS, BPE_DELIMITER, EOS, OFFSET

SPECIAL_TOKENS = {"<boe>": BOE, "<s>": BOS, "</s>": EOS, "<bpe_delimiter>": BPE_DELIMITER}


def write_tokenizer(folder: Path, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`: a text becomes BOS and its bytes.

    It has no padding token, so that it refuses to pad. `BltForCausalLM` pads with nothing that its patcher and global
    transformer leave out: padding before a text would be read as a part of it, without a word.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a text that says <s> means these three bytes
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
    """The letter that stands for each byte in a byte-level vocabulary.

    A byte that is a printable character in Latin-1 stands for itself, the others for the characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]
