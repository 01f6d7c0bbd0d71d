"""Byte-level BPE: the ids of token LMs, trained, read, and written in the format of Hugging Face `tokenizers`.

Every text becomes ids that stand for exactly its bytes. Where bytes are not UTF-8, which the library cannot take, each
of them is the id of that byte alone, and the text between them is encoded as usual.

Source: Sennrich et al. 2016; on bytes, Radford et al. 2019.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bytelatent.errors import UserError
from bytelatent.vocab import BOE, BOS, BPE_DELIMITER, EOS, OFFSET, VOCAB_SIZE, Vocabulary, to_bytes

TOKENIZER = "tokenizer.json"
SPECIAL_TOKENS = {"<boe>": BOE, "<s>": BOS, "</s>": EOS, "<bpe_delimiter>": BPE_DELIMITER}
# The tokens that begin and end a document, by the names that tokenizers give them.
BEGINS = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")
ENDS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
NOT_UTF8 = re.compile("([\udc80-\udcff]+)")
PROBE = "  A b's 1234\n\n\t\r\n\x00 é e\u0301 \u00a0\u200b\ufeff漢字 🙂🏽 <s> Ġ ﬁ"  # what normalizers change


class Tokenizer(Vocabulary):
    """A byte-level BPE.

    Args:
        text: of a `tokenizer.json`.
        name: the file, for errors.

    Raises:
        UserError: it is something else, it does not give every text back byte for byte, or the package is missing.
    """

    is_tokens = True

    def __init__(self, text: str, name: str = TOKENIZER):
        self.text, self.name = text, name
        try:
            values: Any = json.loads(text)
            added = {token["content"]: token["id"] for token in values.get("added_tokens") or []}
            self._added: dict[str, int] = added
            letters: dict[str, int] = values["model"]["vocab"]
            self.size = 1 + max(*letters.values(), *added.values(), VOCAB_SIZE - 1)
            # Nothing in a text means a special token, and this class adds those that begin and end it.
            plain = {**values, "added_tokens": [], **dict.fromkeys(("truncation", "padding", "post_processor"))}
            self._json = json.dumps(plain)
            byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
            self._byte_ids = np.array([letters[letter] for letter in byte_of])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"'{name}' is no tokenizer.json of a byte-level BPE; blt tokenizer trains one") from None
        self.bytes_of = [b""] * self.size
        for token, id_ in letters.items():
            if token not in added and all(letter in byte_of for letter in token):
                self.bytes_of[id_] = bytes(byte_of[letter] for letter in token)
        self.id_bytes = np.array([len(data) for data in self.bytes_of])
        self.bos, self.eos = (self._special(added, names) for names in (BEGINS, ENDS))
        self.dtype = np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)
        if self.decode(self.encode(PROBE)) != PROBE.encode():
            raise UserError(
                f"'{name}' does not give every text back byte for byte, as its normalizer or prefix changes some; take "
                "a plain byte-level BPE, such as blt tokenizer trains"
            )

    @classmethod
    def read(cls, path: str | Path, setting: str = "tokenizer") -> "Tokenizer":
        """The tokenizer in a file.

        Args:
            setting: names the path, for errors.

        Raises:
            UserError: as the class; or the file cannot be read.
        """
        try:
            return cls(Path(path).read_text(encoding="utf-8-sig"), str(path))
        except FileNotFoundError:
            raise UserError(
                f"{setting}: '{path}' does not exist; train one: blt tokenizer TEXT --out {TOKENIZER}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(f"{setting}: '{path}' cannot be read: {why}") from None
        except UserError as error:
            raise UserError(f"{setting}: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_library"}

    @cached_property
    def _library(self) -> Any:
        try:
            return _library().Tokenizer.from_str(self._json)
        except Exception as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"'{self.name}' is no tokenizer.json: {error}") from None

    def _special(self, added: Mapping[str, int], names: Sequence[str]) -> int:
        for name in names:
            if name in added:
                return added[name]
        raise UserError(f"'{self.name}' has none of the tokens {', '.join(names)}, which begin or end a document")

    def name_of(self, id_: int) -> str:
        """The token of a special id."""
        return next(token for token, number in self._added.items() if number == id_)

    def encode(self, text: str | bytes, bos: bool = True, eos: bool = True) -> np.ndarray:
        data = to_bytes(text)
        try:
            parts = [data.decode()]
        except UnicodeDecodeError:
            parts = NOT_UTF8.split(data.decode(errors="surrogateescape"))
        found: list[Any] = [[self.bos]] if bos else []
        for number, part in enumerate(parts):
            if number % 2:  # these are no UTF-8
                found.append(self._byte_ids[np.frombuffer(part.encode(errors="surrogateescape"), np.uint8)])
            elif part:
                found.append(self._library.encode_batch_fast([part], add_special_tokens=False)[0].ids)
        return np.concatenate([*(np.asarray(ids, np.int64) for ids in found), np.array([self.eos] * eos, np.int64)])

    def decode(self, ids: np.ndarray | Sequence[int]) -> bytes:
        return b"".join(self.bytes_of[id_] for id_ in ids if id_ >= 0)


def content_digest(path: Path) -> str:
    """A digest of what decides about the ids of a text: the same however the file is laid out.

    Raises:
        UserError: the file cannot be read, or is no tokenizer.json.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8-sig"))
        model, added = values["model"], values.get("added_tokens") or []
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
        marks = {token["content"]: token["id"] for token in added if token["content"] in (*BEGINS, *ENDS)}
        content = [model["vocab"], merges, marks, values.get("pre_tokenizer"), values.get("normalizer")]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except OSError as error:
        raise UserError(f"tokenizer: '{path}' cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"tokenizer: '{path}' is no tokenizer.json; blt tokenizer trains one") from None


def train_tokenizer(documents: Iterable[bytes], vocab_size: int) -> str:
    """The `tokenizer.json` of a BPE: ids 0 to 259 as those of bytes, then a token for each merge; the same each time.

    Text is cut into words, numbers and runs of punctuation first, with the space before each. There are fewer ids where
    the text has no more pairs that come twice.

    Args:
        vocab_size: number of ids.
    """
    library = _library()
    trained = library.Tokenizer(library.models.BPE())
    trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - OFFSET, min_frequency=2, show_progress=False, initial_alphabet=byte_letters()
    )
    trained.train_from_iterator(_strings(documents), trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]
    return tokenizer_json([merge.split(" ") if isinstance(merge, str) else merge for merge in merges])


def _strings(documents: Iterable[bytes]) -> Iterator[str]:
    """The stretches of documents that are UTF-8."""
    for data in documents:
        yield from (part for part in NOT_UTF8.split(data.decode(errors="surrogateescape"))[::2] if part)


def tokenizer_json(merges: Sequence[Sequence[str]] = ()) -> str:
    """A `tokenizer.json` for which a text is BOS and its bytes, merged where there are merges.

    Without merges nothing is gained by cutting the text into words first.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": bool(merges)}
    flags = {**dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False), "special": True}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    vocab = SPECIAL_TOKENS | {letter: number for number, letter in enumerate(byte_letters(), start=OFFSET)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    values = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer")),
        "added_tokens": [{"id": number, "content": text, **flags} for text, number in SPECIAL_TOKENS.items()],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": vocab,
            "merges": [list(merge) for merge in merges],
        },
    }
    return json.dumps(values, indent=1, ensure_ascii=False)


def byte_letters() -> list[str]:
    """The letter of each byte in a byte-level vocabulary.

    Bytes that are printable characters in Latin-1 have these as letters, the others the characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise UserError("a token LM needs the package tokenizers; run: pip install 'bytelatent[hf]'") from None
    return tokenizers
