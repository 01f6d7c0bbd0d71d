"""Registers the classes with transformers' Auto classes, and lets these find what has no `model_type`."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (  # pyright: ignore[reportMissingImports]
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
)

from bytelatent.hf.config import BytelatentConfig
from bytelatent.hf.model import BytelatentForCausalLM
from bytelatent.hf.tokenizer import BytelatentTokenizer
from bytelatent.packaged import packaged_folder
from bytelatent.weights import FORMATS
from bytelatent.weights.pretrained import is_on_hub
from bytelatent.weights.stored_model import FORMAT

HUB = ("revision", "token", "local_files_only", "cache_dir", "subfolder")


def register_classes() -> None:
    """Register configuration, model and tokenizer; again has no effect."""
    if isinstance(AutoConfig.from_pretrained, functools.partial):
        return
    AutoConfig.register(BytelatentConfig.model_type, BytelatentConfig, exist_ok=True)
    AutoModelForCausalLM.register(BytelatentConfig, BytelatentForCausalLM, exist_ok=True)
    AutoTokenizer.register(BytelatentConfig, fast_tokenizer_class=BytelatentTokenizer, exist_ok=True)
    # A run and older formats have no `model_type`, and transformers has no other way to add how a model is found.
    found: Any = AutoConfig
    found.from_pretrained = functools.partial(_from_pretrained, AutoConfig.from_pretrained)


def _from_pretrained(theirs: Callable[..., Any], source: str | Path, **arguments: Any) -> Any:
    """`AutoConfig.from_pretrained`, for our models, too."""
    if is_ours(source, arguments):
        return BytelatentConfig.from_pretrained(source, **arguments)
    return theirs(source, **arguments)


def is_ours(source: str | Path, arguments: dict[str, Any]) -> bool:
    """Whether a folder or repository holds a model that only this package reads, such as a run."""
    if packaged_folder(source) is not None:
        return True
    if Path(source).is_dir():
        return any(FORMATS[name].recognizes(Path(source)) for name in ("native", "meta"))
    if not is_on_hub(str(source)):
        return False
    try:
        values, _ = PretrainedConfig.get_config_dict(
            source, **{name: arguments[name] for name in HUB if name in arguments}
        )
    except (OSError, ValueError):  # transformers says why
        return False
    named = values.get("model_type")
    return named == BytelatentConfig.model_type or (
        named is None and (values.get("format") == FORMAT or "args" in values)
    )
