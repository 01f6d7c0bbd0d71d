"""Settings of `blt chat`. Nothing here imports torch, so that help is shown at once."""

from typing import Annotated, ClassVar

from pydantic import Field

from bytelatent.commands.options import DEFAULT_MODEL, ThresholdSettings
from bytelatent.config import ARGUMENT, Option
from bytelatent.inference.settings import MAX_NEW_BYTES, REMOVED, KVCacheNumbers, Quantization, Sampling


class ChatSettings(ThresholdSettings):
    """Talk with a model: its answers come as they are written. /help lists the commands.

    Example:  `blt chat runs/chat --system "You are brief."`

    Piped:  `printf 'What is 2 plus 3?\\n' | blt chat runs/chat --json`

    Attributes:
        model: a run, a folder with a model, OWNER/NAME on the hub, or tiny, the model in the package.
        system: system message, with which the conversation begins.
        chat_template: file of Jinja, or a folder with a model that has a template, in place of the model's own.
        context: bytes of the prompt and the answer together. Older messages are dropped. Default: as in training.
        max_new_bytes: largest number of bytes of an answer.
        as_json: each line of standard input is a JSON object {"content": ...}, or {"messages": [...]} for a
            conversation of its own; each answer is one, too.
        device: device: auto, cpu, cuda or mps.
        dtype: precision: float32, bfloat16 or auto (as the weights are stored).
        quantize: quantization of large matrices, faster on a GPU: int8, fp8 or full (none).
        kv_cache: KV caches: int8 for about half of bfloat16's memory, or full.
    """

    removed: ClassVar[dict[str, str]] = REMOVED

    model: Annotated[str, ARGUMENT] = DEFAULT_MODEL
    system: str | None = None
    chat_template: str | None = None
    context: int | None = Field(default=None, ge=2, le=10**7)
    max_new_bytes: Annotated[int, Option(("--max-new-bytes", "-n"))] = Field(default=1000, ge=1, le=MAX_NEW_BYTES)
    sampling: Sampling = Sampling()
    as_json: Annotated[bool, Option(("--json",))] = False
    device: str = "auto"
    dtype: str = "auto"
    quantize: Quantization = "full"
    kv_cache: KVCacheNumbers = "full"
