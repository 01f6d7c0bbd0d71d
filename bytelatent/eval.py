"""Bits per byte of any model on text."""

from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from bytelatent.data import DataSettings, Patcher, batches_once
from bytelatent.device import choose_device
from bytelatent.errors import UserError
from bytelatent.evaluation import evaluate
from bytelatent.interop import load
from bytelatent.progress import Progress
from bytelatent.text import find_files
from bytelatent.text.places import size_of

COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".parquet")


def evaluate_model(
    model: str, text: list[str], entropy: str | None, max_bytes: int | None, device: str, console: Console
) -> dict[str, Any]:
    """Evaluate a BLT or a byte LM.

    Raises:
        UserError: the model or the text is not there.
    """
    found = load(model, entropy)
    place = choose_device(device)
    patcher = None
    if found.config.patching is not None:
        if found.config.patching.needs_entropies and found.byte_lm is None:
            raise UserError(f"eval: the patches of '{model}' need a byte LM; name it with --entropy")
        # In float32, however it is stored: the same patches as those of `BLT`.
        patcher = Patcher(found.config.patching, found.byte_lm.to(place, torch.float32) if found.byte_lm else None)
    sources = DataSettings.parse({"train": text}).train
    total = _about_bytes([file for source in sources for file in find_files(source.path)], max_bytes)
    context = found.config.context
    batches = batches_once(sources, context, max(context, 4096), patcher, max_bytes)
    with Progress("measuring", total, console, about=True) as progress:
        result = evaluate(found.model.to(place), batches, on_batch=progress.advance)
    return {"model": found.source, **asdict(result)}


def _about_bytes(files: list[str], max_bytes: int | None) -> int | None:
    """About how much text there is to read, for the time left; None where the files do not say.

    Text is taken to be as large as the files that hold it, and compressed to a third.
    """
    try:
        size = sum(size_of(file) * (3 if file.endswith(COMPRESSED) else 1) for file in files)
    except OSError:
        return max_bytes
    return size if max_bytes is None else min(size, max_bytes)
