"""Bits per byte of models on text: `blt eval TEXT...`."""

import math
from dataclasses import asdict
from typing import Any

import torch

from bytelatent.commands.options import EvaluateSettings
from bytelatent.data import Patcher, SourceSettings, batches_once
from bytelatent.device import choose_device
from bytelatent.errors import UserError
from bytelatent.evaluation import evaluate
from bytelatent.progress import Progress
from bytelatent.terminal import print_json, print_line
from bytelatent.text import BadRows, find_files
from bytelatent.text.documents import forget_logged, must_have_read
from bytelatent.text.formats import kind_of
from bytelatent.text.streams import size_of
from bytelatent.weights import load


def run(settings: EvaluateSettings) -> None:
    result = evaluate_model(settings)
    if settings.as_json:
        print_json(result)
    else:
        patches = "" if result["mean_patch_bytes"] is None else f"  {result['mean_patch_bytes']:.2f} bytes per patch"
        print_line(f"{result['bits_per_byte']:.4f} bits per byte on {result['num_bytes']:,} bytes{patches}")
    must_have_read(result["unread"])


def evaluate_model(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate a BLT or a byte LM.

    Returns:
        The result, with the number of `bad_rows` and the files that are `unread`, of which nothing could be read.

    Raises:
        UserError: the model or the text is not there, or there are too many bad rows.
    """
    forget_logged()
    [model], max_bytes = settings.model, settings.max_bytes
    found = load(model, settings.entropy_model, device=choose_device(settings.device))
    patcher = None
    if found.config.patching is not None:
        if found.config.patching.needs_entropies and found.byte_lm is None:
            raise UserError(f"eval: the patches of '{model}' need a byte LM; name it with --entropy-model")
        # In float32, however it is stored: the same patches as those of `BLT`.
        patcher = Patcher(found.config.patching, found.byte_lm.to(torch.float32) if found.byte_lm else None)
    sources = [SourceSettings.parse({"path": path, "text_key": settings.text_key}) for path in settings.text]
    files = [file for source in sources for file in find_files(source.path)]
    bad, context = BadRows(settings.max_bad_rows), found.config.context
    limits = {"bad_rows": bad, "max_row_bytes": settings.max_row_bytes}
    batches = batches_once(sources, context, max(context, 4096), patcher, max_bytes, **limits)
    with Progress("measuring", _about_bytes(files, max_bytes), about=True) as progress:
        try:
            result = evaluate(found.model, batches, on_batch=progress.advance)
        except UserError:
            must_have_read(bad.unread)  # names a file, where the other reports that there was no text
            raise
    if not math.isfinite(result.bits_per_byte):
        raise UserError(f"eval: '{model}' gives {result.bits_per_byte} bits per byte; its weights are corrupt")
    return {"model": found.source, **asdict(result), "bad_rows": bad.count, "unread": bad.unread}


def _about_bytes(files: list[str], max_bytes: int | None) -> int | None:
    """About how much text there is to read, for the time left; None where a file's size is not known.

    Text is taken to be as large as the files that hold it, and compressed to a third.
    """
    size = 0
    try:
        for file in files:
            kind = kind_of(file)
            is_compressed = kind.compression is not None or (kind.format is not None and not kind.format.compressible)
            size += size_of(file) * (3 if is_compressed else 1)
    except (OSError, UserError):
        return max_bytes
    return size if max_bytes is None else min(size, max_bytes)
