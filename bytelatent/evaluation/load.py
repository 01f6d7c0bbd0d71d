"""Models of any kind from runs, folders and repositories, for `TextModel`: found and checked first, loaded later."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bytelatent.data import Patcher
from bytelatent.errors import UserError, in_one_line
from bytelatent.evaluation.models import PackedModel, TextModel, TransformersModel
from bytelatent.files import json_if_any
from bytelatent.hub import model_folder
from bytelatent.inference import FastEntropies
from bytelatent.inference.packed import ROWS, packed_form
from bytelatent.model import BLTModel, BLTSettings, ByteLM, TokenLMSettings
from bytelatent.patching import PatchSettings
from bytelatent.text.tokenizer import TOKENIZER
from bytelatent.vocab import BYTES, Vocabulary
from bytelatent.weights import StoredModel, open_pretrained
from bytelatent.weights.llama import FAMILIES
from bytelatent.weights.pretrained import is_on_hub, open_folder
from bytelatent.weights.side_files import SIDECAR

BATCH_ON_GPU, BATCH_ELSEWHERE = 131_072, 4096  # ids of a batch
LOGITS_ON_GPU, LOGITS_ELSEWHERE = 2**30, 2**26  # that a model may give at once
LONGEST_CONTEXT = 8192  # of a model of transformers, unless more are asked for: memory grows with it
UNKNOWN_CONTEXT = 2048
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
INSTALL = "which is not installed; run: pip install 'bytelatent[eval]'"


@dataclass(frozen=True)
class ReadSettings:
    """How models read texts; None: as fits the model and the device.

    Attributes:
        dtype: of weights and products.
        tokenizer: of models of tokens whose folders hold none: a file or a folder.
        threshold: of patches by entropy, in nats; None: the model's own.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    context: int | None = None
    overlap: int = 0
    batch_ids: int | None = None
    tokenizer: str | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class FoundModel:
    """A model that is there and complete, and is not loaded yet.

    Attributes:
        reads_tokens: it reads only texts that are valid UTF-8.
        state: changes when its files do, or the content of its tokenizer.
        stored: None for one of transformers.
        takes: those of the options `entropy_model`, `threshold` and `tokenizer` that change what it does.
    """

    name: str
    context: int
    reads_tokens: bool
    state: str
    load: Callable[[], TextModel]
    stored: StoredModel | None = None
    takes: frozenset[str] = frozenset()


def find_models(sources: Sequence[str], entropy_model: str | None, how: ReadSettings) -> list[FoundModel]:
    """Find models, as `find_model` does each.

    Raises:
        UserError: also if an option is one that none of them takes.
    """
    found = [find_model(source, entropy_model, how, len(sources) > 1) for source in sources]
    given = {"entropy_model": entropy_model, "threshold": how.threshold, "tokenizer": how.tokenizer}
    needed = {"entropy_model": "patches by entropy", "threshold": "patches by entropy", "tokenizer": "need of it"}
    for name, value in given.items():
        if value is not None and not any(name in model.takes for model in found):
            which = f"'{sources[0]}' has no" if len(sources) == 1 else f"none of the {len(sources)} models has"
            raise UserError(f"{name}: {which} {needed[name]}; leave it out")
    return found


def find_model(source: str, entropy_model: str | None, how: ReadSettings, one_of_several: bool = False) -> FoundModel:
    """Find a BLT, a byte LM, a token LM, or a causal language model of transformers, as its config.json has it.

    Args:
        source: a run, a folder, or OWNER/NAME on the hub.
        entropy_model: finds patches; of several models, those of BLTs. So does a threshold.

    Raises:
        UserError: there is no model, it is not complete, a package or its tokenizer is missing.
    """
    if (folder := _folder_of_transformers(source)) is not None:
        if how.threshold is not None and not one_of_several:
            raise UserError(f"threshold: '{source}' has no patches; leave it out")
        return _in_transformers(source, folder, how)
    stored = open_pretrained(source, None if one_of_several else entropy_model)
    if one_of_several and entropy_model is not None and isinstance(stored.config.model, BLTSettings):
        stored = open_pretrained(source, entropy_model)
    takes = set()
    if isinstance(stored.config.model, TokenLMSettings) and stored.tokenizer is None:
        if how.tokenizer is None:
            raise UserError(
                f"model: '{source}' reads tokens, and its folder holds no {TOKENIZER}; name it: --tokenizer"
            )
        place = _given_tokenizer(how.tokenizer)
        place = place / TOKENIZER if place.is_dir() else place
        stored.config.check_tokenizer(place)
        stored = replace(stored, tokenizer=place)
        takes.add("tokenizer")
    if not one_of_several or (stored.config.patching is not None and stored.config.patching.needs_entropies):
        stored = stored.with_threshold(how.threshold)
    patching, context = stored.config.patching, stored.config.context if how.context is None else how.context
    if isinstance(stored.config.model, BLTSettings):
        if patching is None:
            raise UserError(f"model: '{source}' has no patching settings; its config.json should have them")
        if patching.needs_entropies and stored.byte_lm is None:
            raise UserError(f"eval: the patches of '{source}' need a byte LM; name it with --entropy-model")
    context = _checked(context, how, source)
    if patching is not None and patching.needs_entropies:
        takes |= {"entropy_model", "threshold"}
    state = state_of([part.folder for part in (stored, stored.byte_lm) if part is not None], stored.tokenizer)
    load = partial(_load, stored, source, context, how)
    return FoundModel(source, context, False, state, load, stored, frozenset(takes))


def _given_tokenizer(place: str) -> Path:
    """A tokenizer.json, or a folder with a tokenizer."""
    path = Path(place).expanduser()
    if not (path.is_file() or any((path / name).is_file() for name in TOKENIZER_FILES)):
        what = "holds no tokenizer" if path.exists() else "does not exist"
        raise UserError(f"tokenizer: '{place}' {what}; name a tokenizer.json, or a folder with one")
    return path


def _checked(context: int, how: ReadSettings, source: str) -> int:
    if how.overlap >= context:
        raise UserError(
            f"overlap: {how.overlap} ids leave no new ones in the context of '{source}', {context}; give fewer"
        )
    return context


def _load(stored: StoredModel, source: str, context: int, how: ReadSettings) -> PackedModel:
    found = stored.load(how.device, how.dtype)
    return packed_model(source, found.model, stored.config.patching, found.byte_lm, context, how, found.vocabulary)


def packed_model(
    name: str,
    network: Any,
    patching: PatchSettings | None,
    byte_lm: ByteLM | None,
    context: int,
    how: ReadSettings,
    vocabulary: Vocabulary = BYTES,
) -> PackedModel:
    """A loaded BLT, byte LM or token LM, read as fast as its device can."""
    device, patcher = how.device, None
    if isinstance(network, BLTModel) and patching is not None:
        byte_lm = byte_lm.to(torch.float32) if byte_lm is not None else None
        fast = FastEntropies.where_possible(byte_lm, device, how.dtype)
        patcher = Patcher(patching, byte_lm, how.dtype, entropies_of=fast)
    fast = packed_form(network) if device.type == "cuda" and how.dtype != torch.float32 else None
    batch, multiple = how.batch_ids or _batch_ids(device, vocabulary.size), ROWS if fast is not None else 1
    return PackedModel(name, fast or network, device, context, how.overlap, batch, patcher, vocabulary, multiple)


def _folder_of_transformers(source: str) -> Path | None:
    """Where a model is, if transformers has its class and this package has not."""
    path = Path(source)
    with suppress(RuntimeError, OSError, UserError):  # these are named when it is opened
        path = path.expanduser()
        if not path.exists() and is_on_hub(source):
            path = model_folder(source)
        kind = (json_if_any(path / "config.json") or {}).get("model_type")
        return None if kind in (None, "blt") else path
    return None


def _in_transformers(source: str, folder: Path, how: ReadSettings) -> FoundModel:
    try:
        from transformers import AutoConfig
    except ImportError:
        raise UserError(f"model: '{source}' is one of Hugging Face transformers, {INSTALL}") from None
    config = _explained(source, lambda: AutoConfig.from_pretrained(folder).get_text_config())
    if how.tokenizer is None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"model: '{source}' reads tokens, and its folder holds no tokenizer; name it with --tokenizer")
    given = None if how.tokenizer is None else _given_tokenizer(how.tokenizer)
    if (folder / SIDECAR).is_file() and config.model_type in FAMILIES:
        place = given or folder
        place = place / TOKENIZER if place.is_dir() else place
        open_folder(folder, weights=False).config.check_tokenizer(place)
    longest = getattr(config, "max_position_embeddings", None) or UNKNOWN_CONTEXT
    context = _checked(min(longest, LONGEST_CONTEXT) if how.context is None else how.context, how, source)
    if context > longest:
        raise UserError(f"context: '{source}' reads {longest} ids at most, not {context}; lower --context")
    load = partial(_load_transformers, source, folder, config, context, how)
    return FoundModel(source, context, True, state_of([folder], given or folder), load, takes=frozenset({"tokenizer"}))


def _load_transformers(source: str, folder: Path, config: Any, context: int, how: ReadSettings) -> TransformersModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    start, end, encode, decode = _explained(source, lambda: _tokenizer(folder, config, how.tokenizer))
    network, about = _explained(
        source,
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=how.dtype, output_loading_info=True),
    )
    if missing := sorted(about["missing_keys"]):
        raise UserError(f"model: '{source}' lacks weights of a causal language model, such as {missing[0]}")
    batch = how.batch_ids or _batch_ids(how.device, config.vocab_size)
    network = network.to(how.device).eval()
    return TransformersModel(
        source, network, encode, decode, start, end, how.device, context, how.overlap, batch_ids=batch
    )


def _batch_ids(device: torch.device, vocab_size: int) -> int:
    if device.type == "cuda":
        return min(BATCH_ON_GPU, LOGITS_ON_GPU // vocab_size)
    return min(BATCH_ELSEWHERE, LOGITS_ELSEWHERE // vocab_size)


def _tokenizer(folder: Path, config: Any, path: str | None) -> tuple[int | None, int | None, Any, Any]:
    """The ids before and at the end of a text, and what turns texts into ids and back."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    is_file = path is not None and Path(path).expanduser().is_file()
    if is_file:
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(Path(str(path)).expanduser()))
        bos, eos = config.bos_token_id, config.eos_token_id
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder if path is None else Path(path).expanduser())
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    bos, eos = (found[0] if isinstance(found, list) else found for found in (bos, eos))
    start = eos if bos is None else bos
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return start, eos, lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # a text that spells one is text

    def encode(text: str) -> Sequence[int]:
        return backend.encode(text, add_special_tokens=False).ids

    return start, eos, encode, lambda ids: backend.decode(ids, skip_special_tokens=False)


def _explained(source: str, load: Callable[[], Any]) -> Any:
    """What transformers loads, its errors in one line."""
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # of any class
        raise UserError(f"model: transformers cannot load '{source}': {in_one_line(error)[:300]}") from None


def state_of(places: Sequence[Path | None], tokenizer: Path | None = None) -> str:
    """A digest of the files of a model, by their names, sizes and times, and of its tokenizer's content."""
    digest = hashlib.blake2b(digest_size=8)
    if tokenizer is not None:
        files = [tokenizer / name for name in TOKENIZER_FILES] if tokenizer.is_dir() else [tokenizer]
        for file in files:
            digest.update(file.read_bytes() if file.is_file() else b"")
    for place in places:
        if place is not None:
            for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
                about = file.stat()
                digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
