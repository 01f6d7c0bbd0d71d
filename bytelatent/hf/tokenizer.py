"""The byte tokenizer for transformers: id = byte + 4."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]
from transformers import BatchEncoding, PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]
from transformers.models.auto.tokenization_auto import get_tokenizer_config  # pyright: ignore[reportMissingImports]

from bytelatent.errors import UserError
from bytelatent.hf.config import OF_AUTO, BytelatentConfig, found_by
from bytelatent.packaged import packaged_folder
from bytelatent.text.chat import ChatTemplate, Rendered
from bytelatent.text.tokenizer import tokenizer_json
from bytelatent.vocab import BOE, BOS, BPE_DELIMITER, EOS
from bytelatent.weights import open_pretrained

# Other names than in exports for transformers' own class: there `<s>` in a text is bytes, as in HTML. Here a chat
# template, and a trainer that adds the end of a text, write special ids by name.
TOKENS = {BOE: "<|pad|>", BOS: "<|begin|>", EOS: "<|end|>", BPE_DELIMITER: "<|delimiter|>"}
HUB = ("revision", "token", "local_files_only", "cache_dir", "subfolder")
REPLACED = ("tokenizer_file", "tokenizer_object", "vocab_file", "vocab", "merges", "post_processor", "backend")


def byte_tokenizer(add_bos: bool, add_eos: bool) -> str:
    """A `tokenizer.json` for which a text is its bytes, between BOS and EOS where these are added."""
    values = json.loads(tokenizer_json())
    vocab = values["model"]["vocab"]
    values["model"]["vocab"] = {TOKENS.get(number, letter): number for letter, number in vocab.items()}
    for token in values["added_tokens"]:
        token["content"] = TOKENS[token["id"]]

    def special(number: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": TOKENS[number], "type_id": 0}}

    before, after = [special(BOS)] * add_bos, [special(EOS)] * add_eos
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*before, first, *after],
        "pair": [*before, first, second, *after],
        "special_tokens": {
            TOKENS[number]: {"id": TOKENS[number], "ids": [number], "tokens": [TOKENS[number]]} for number in (BOS, EOS)
        },
    }
    return json.dumps(values)


class BytelatentTokenizer(PreTrainedTokenizerFast):
    """A byte is the id byte + 4; PAD is 0, BOS 1 and EOS 2.

        tokenizer = BytelatentTokenizer(add_eos_token=True)  # for training on whole texts
        tokenizer(["a", "été"], padding=True, return_tensors="pt")

    In a text, `<|begin|>`, `<|end|>` and `<|pad|>` mean these ids; with `split_special_tokens=True` they are bytes,
    which is safer for texts of others. In messages of a chat they are always bytes.

    Args:
        add_bos_token: a text begins with BOS, as models expect it.
        add_eos_token: it ends with EOS. A prompt does not; a text to train on should, for a model to learn where
            texts end.
        more: what transformers' tokenizers take, such as `padding_side` (`right`) and `chat_template`.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012  # as transformers has it
    slow_tokenizer_class = None

    def __init__(
        self,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        adds: Mapping[str, bool] | None = None,  # the two as they are saved: transformers 5 does not save them
        **more: Any,
    ):
        more = {name: value for name, value in more.items() if name not in REPLACED}
        names = {"pad_token": TOKENS[BOE], "bos_token": TOKENS[BOS], "eos_token": TOKENS[EOS]}
        fixed: dict[str, Any] = {"padding_side": "right", "clean_up_tokenization_spaces": False}
        self._adds = dict(adds or {"bos": True, "eos": False})
        super().__init__(tokenizer_object=Tokenizer.from_str(byte_tokenizer(True, False)), **{**names, **fixed, **more})
        self.add_bos_token = self.add_bos_token if add_bos_token is None else add_bos_token
        self.add_eos_token = self.add_eos_token if add_eos_token is None else add_eos_token

    def update_post_processor(self) -> None:
        """Add BOS and EOS as is wanted now."""
        self.init_kwargs["adds"] = dict(self._adds)
        wanted = Tokenizer.from_str(byte_tokenizer(self.add_bos_token, self.add_eos_token))
        self.backend_tokenizer.post_processor = wanted.post_processor

    @property
    def add_bos_token(self) -> bool:
        return self._adds["bos"]

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._adds["bos"] = bool(value)
        self.update_post_processor()

    @property
    def add_eos_token(self) -> bool:
        return self._adds["eos"]

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._adds["eos"] = bool(value)
        self.update_post_processor()

    @classmethod
    def from_pretrained(cls, source: str | Path, *inputs: Any, **more: Any) -> Any:
        """The tokenizer that was saved beside a model, with its chat template; else a new one for the model."""
        hub = {name: more[name] for name in HUB if name in more}
        saved = get_tokenizer_config(packaged_folder(source) or source, **hub)
        if saved.get("tokenizer_class") == cls.__name__:
            wanted = {name: more.pop(name) for name in ("add_bos_token", "add_eos_token") if name in more}
            tokenizer = super().from_pretrained(source, *inputs, **more)
            for name, value in wanted.items():
                setattr(tokenizer, name, value)
            return tokenizer
        found = open_pretrained(source, **found_by(source, more), weights=False)
        if found.chat_template is not None:
            more.setdefault("chat_template", found.chat_template.source)
        config = BytelatentConfig.of(found)
        own = {name: value for name, value in more.items() if name not in (*OF_AUTO, *HUB, "config", "use_fast")}
        return cls(**{"model_max_length": config.context, "name_or_path": str(source), **own})

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: Any = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_dict: bool | None = None,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """As transformers' own, but that special ids come from the template alone, whatever messages say.

        Raises:
            UserError: the messages are none, or the template refuses them.
        """
        asked = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        if not tokenize:
            asked |= {"tools": tools, "documents": documents, "chat_template": chat_template}
            return super().apply_chat_template(conversation, tokenize=False, **asked, **variables)
        if tokenizer_kwargs or not isinstance(continue_final_message, bool):
            raise UserError("apply_chat_template: tokenizer_kwargs and the name of a field are not known here")
        if add_generation_prompt and continue_final_message:
            raise UserError("apply_chat_template: add_generation_prompt and continue_final_message exclude each other")
        if return_dict is None:  # which has changed between versions
            theirs = inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
            return_dict = bool(theirs["return_dict"].default)
        template = ChatTemplate(self.get_chat_template(chat_template, tools))
        variables.pop("sanitize_control_tokens", None)  # they are, always
        asked |= {"tools": tools, "documents": documents, "mask": return_assistant_tokens_mask}
        is_batch = _is_batch(conversation)
        chats = conversation if is_batch else [conversation]
        rows = [template.parts(getattr(chat, "messages", chat), **asked, **variables) for chat in chats]
        found = self._encoded(rows, (max_length or self.model_max_length) if truncation else None)
        masks = found.pop("assistant_masks")
        if padding:
            found = dict(self.pad(found, padding=padding, max_length=max_length))
        if return_assistant_tokens_mask:
            found["assistant_masks"] = [self._padded(*pair) for pair in zip(masks, found["input_ids"], strict=True)]
        if not is_batch and return_tensors is None:
            found = {name: values[0] for name, values in found.items()}
        encoding = BatchEncoding(found, tensor_type=return_tensors)
        return encoding if return_dict else encoding["input_ids"]

    def _encoded(self, rows: list[Rendered], longest: int | None) -> dict[str, Any]:
        """The ids of conversations, with the mask of the assistant's, cut where that is asked for."""
        found: dict[str, Any] = {"input_ids": [], "attention_mask": [], "assistant_masks": []}
        for row in rows:
            ids, is_assistant = row.ids()
            if not (row.parts and row.parts[0].special == "bos"):  # transformers adds none: templates write it
                ids, is_assistant = ids[1:], is_assistant[1:]
            kept = slice(longest) if self.truncation_side == "right" else slice(-longest if longest else None, None)
            found["input_ids"].append(ids[kept].tolist())
            found["attention_mask"].append([1] * len(ids[kept]))
            found["assistant_masks"].append(is_assistant[kept].astype(int).tolist())
        return found

    def _padded(self, mask: list[int], ids: list[int]) -> list[int]:
        padding = [0] * (len(ids) - len(mask))
        return padding + mask if self.padding_side == "left" else mask + padding

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Names of the ids there are can be added, but no ids.

        Raises:
            UserError: there are new ones among them.
        """
        listed = new_tokens if isinstance(new_tokens, list | tuple) else [new_tokens]
        known = self.get_vocab()
        if unknown := [str(token) for token in listed if str(token) not in known]:
            raise UserError(f"tokens: {unknown[0]!r} would be a new id; a byte model has none; write it as text")
        return 0


def _is_batch(conversation: Any) -> bool:
    """Whether it is several conversations, and not one."""
    if not isinstance(conversation, list | tuple) or not conversation:
        return False
    return isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")
