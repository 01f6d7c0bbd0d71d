"""Which text, and how much of it in a batch."""

import math
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from bytelatent.config import Settings, must_be_named, renamed
from bytelatent.model.settings import LONGEST_CONTEXT
from bytelatent.text import MAX_ROW_BYTES
from bytelatent.text.chat import ChatTemplate
from bytelatent.text.conversations import TEXT_KEY, ChatOptions, TrainOn
from bytelatent.text.documents import MAX_BAD_ROWS
from bytelatent.text.stored import MAX_TEXT_BYTES

SPARE_SLOTS = 1.25  # patch slots for each patch that is expected
MOST = 2**26  # ids of a batch, or pieces of text in memory: no machine has room for more


class SourceSettings(Settings):
    """Files that belong together.

    Attributes:
        path: a file, a folder or a glob; also s3://, gs://, hf://, http:// and what else fsspec knows.
        weight: how often a document is taken from this source, relative to the others.
        text_key: the key or column that holds the text; of a conversation its messages, `messages` by default.
        format: `text`; or `chat`: rows are conversations, as `messages`, or as `prompt` and `completion`.
        train_on: of conversations, `assistant`: only its answers count in the loss; `all`: every byte does.
    """

    path: str
    weight: float = Field(default=1.0, gt=0)
    text_key: str = TEXT_KEY
    format: Literal["text", "chat"] = "text"
    train_on: TrainOn = "assistant"

    def chat(self, template: ChatTemplate) -> ChatOptions | None:
        """How its conversations are read; None for a source of texts."""
        return ChatOptions(template, self.train_on) if self.format == "chat" else None

    @model_validator(mode="after")
    def _only_chats_have_answers(self) -> Self:
        if self.format == "text" and "train_on" in self.model_fields_set and self.train_on != "assistant":
            raise ValueError("train_on is for conversations: set format: chat, or leave it out")
        return self

    @field_validator("path")
    @classmethod
    def _is_named(cls, value: str) -> str:
        return must_be_named(value, "a file, a folder (. for this one) or a pattern")


class DataSettings(Settings):
    """The text of a training run.

    Attributes:
        train, valid: sources; a path alone will do. No text is held out where `valid` is null or empty.
        chat_template: how conversations (`format: chat` of a source) are written, a file of Jinja or the folder of a
            model that has one; the default template if left out. The run keeps a copy, and so do its models.
        tokenizer: for a token LM, the tokenizer.json of a byte-level BPE, as `blt tokenizer` trains it. The run keeps
            a copy, so that the model can be used on other text.
        context: ids that a document's pieces hold at most.
        batch_bytes: ids in a batch.
        batch_patches: patch slots in a batch, so that shapes never change; None for as many as there are.
        patch_bytes: the mean patch that is expected, in bytes, in place of `batch_patches`: there are slots for as many
            patches of this size as a batch holds bytes, and a quarter more. Of a token LM, the mean token: a batch has
            as many ids as hold `batch_bytes` bytes. So models of any patches and tokens read as many bytes in a step.
        shuffle_buffer: pieces among which the next one is drawn.
        workers: processes that read ahead; 0 reads in the training process. The batches are the same.
        max_bad_rows: bad rows and files of a source that are passed over in an epoch; one more is an error.
        max_row_bytes: a longer row is a bad one.
        allow_changed: a run goes on though its text is another than at its last start.
    """

    train: list[SourceSettings] = Field(min_length=1)
    valid: list[SourceSettings] = Field(default=[])
    chat_template: str | None = None
    tokenizer: str | None = None
    context: int = Field(default=8192, ge=2, le=LONGEST_CONTEXT)
    batch_bytes: int = Field(default=16_384, ge=2, le=MOST)
    batch_patches: int | None = Field(default=None, ge=2, le=MOST)
    patch_bytes: float | None = Field(default=None, ge=1, le=10**6)
    shuffle_buffer: int = Field(default=256, ge=1, le=MOST)
    workers: int = Field(default=0, ge=0, le=1024)
    max_bad_rows: int = Field(default=MAX_BAD_ROWS, ge=0)
    max_row_bytes: int = Field(default=MAX_ROW_BYTES, ge=1, le=MAX_TEXT_BYTES)
    allow_changed: bool = False

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, values: Any) -> Any:
        return renamed(values, {"max_damaged": "max_bad_rows"}, "data.")

    @model_validator(mode="after")
    def _one_number_of_slots(self) -> Self:
        if self.batch_patches is not None and self.patch_bytes is not None:
            raise ValueError("batch_patches and patch_bytes both say how many patch slots there are; give one of them")
        return self

    @property
    def has_chats(self) -> bool:
        """Whether some of the sources hold conversations."""
        return any(source.format == "chat" for source in (*self.train, *self.valid))

    @property
    def patch_slots(self) -> int | None:
        """Patch slots in a batch; None for as many as there are patches."""
        if self.patch_bytes is None or self.tokenizer is not None:
            return self.batch_patches
        return min(self.batch_bytes + 1, max(2, math.ceil(SPARE_SLOTS * self.batch_bytes / self.patch_bytes)))

    @property
    def batch_ids(self) -> int:
        """Ids in a batch."""
        if self.tokenizer is None or self.patch_bytes is None:
            return self.batch_bytes
        return max(2, round(self.batch_bytes / self.patch_bytes))

    @field_validator("train", "valid", mode="before")
    @classmethod
    def _paths(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.field_name == "train":
            raise ValueError("there is no text to train on; name it, as in data.train='text/*.jsonl'")
        values = [value] if isinstance(value, str | dict) else value or []
        if not isinstance(values, list | tuple):
            return values
        return [{"path": item} if isinstance(item, str) else item for item in values]
