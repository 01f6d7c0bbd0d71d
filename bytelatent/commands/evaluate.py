"""Bits per byte of any model on text: `blt eval`, also as `python -m bytelatent.eval`."""

import math
from dataclasses import asdict
from typing import Any

import torch

from bytelatent.commands.settings import EvaluateSettings
from bytelatent.data import Patcher, SourceSettings, batches_once
from bytelatent.device import choose_device
from bytelatent.errors import UserError
from bytelatent.evaluation import evaluate
from bytelatent.progress import Progress
from bytelatent.terminal import print_json, print_line
from bytelatent.text import MAX_ROW_BYTES, BadRows, find_files
from bytelatent.text.bad_rows import MAX_BAD_ROWS, must_have_read
from bytelatent.text.formats import FileKind, kind_of
from bytelatent.text.streams import size_of
from bytelatent.weights import load


def run(settings: EvaluateSettings) -> None:
    given = settings.model_dump(exclude={"as_json"})
    result = evaluate_model(**given)
    if settings.as_json:
        print_json(result)
    else:
        patches = "" if result["mean_patch_bytes"] is None else f"  {result['mean_patch_bytes']:.2f} bytes per patch"
        print_line(f"{result['bits_per_byte']:.4f} bits per byte on {result['num_bytes']:,} bytes{patches}")
    must_have_read(result["unread"])


def evaluate_model(
    model: str,
    text: list[str],
    entropy_model: str | None,
    max_bytes: int | None,
    device: str,
    text_key: str = "text",
    max_bad_rows: int = MAX_BAD_ROWS,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> dict[str, Any]:
    """Evaluate a BLT or a byte LM.

    Args:
        text_key: the key or column that holds the text.
        max_bad_rows: bad rows and files that are passed over; one more is an error.
        max_row_bytes: a longer row is a bad one.

    Returns:
        The result, with the number of `bad_rows` and the files that are `unread`, of which nothing could be read.

    Raises:
        UserError: the model or the text is not there, or there are too many bad rows.
    """
    place = choose_device(device)
    found = load(model, entropy_model, device=place)
    patcher = None
    if found.config.patching is not None:
        if found.config.patching.needs_entropies and found.byte_lm is None:
            raise UserError(f"eval: the patches of '{model}' need a byte LM; name it with --entropy-model")
        # In float32, however it is stored: the same patches as those of `BLT`.
        patcher = Patcher(found.config.patching, found.byte_lm.to(torch.float32) if found.byte_lm else None)
    sources = [SourceSettings.parse({"path": path, "text_key": text_key}) for path in text]
    bad = BadRows(max_bad_rows)
    files = [file for source in sources for file in find_files(source.path)]
    context = found.config.context
    size = max(context, 4096)
    batches = batches_once(sources, context, size, patcher, max_bytes, bad_rows=bad, max_row_bytes=max_row_bytes)
    with Progress("measuring", _about_bytes(files, max_bytes), about=True) as progress:
        try:
            result = evaluate(found.model, batches, on_batch=progress.advance)
        except UserError:
            bad.must_have_read()  # names a file, where the other says that there was no text
            raise
    if not math.isfinite(result.bits_per_byte):
        raise UserError(f"eval: '{model}' gives {result.bits_per_byte} bits per byte; its weights are corrupt")
    return {"model": found.source, **asdict(result), "bad_rows": bad.count, "unread": bad.unread}


def _about_bytes(files: list[str], max_bytes: int | None) -> int | None:
    """About how much text there is to read, for the time left; None where the files do not say.

    Text is taken to be as large as the files that hold it, and compressed to a third.
    """
    try:
        size = sum(size_of(file) * (3 if _is_compressed(kind_of(file)) else 1) for file in files)
    except (OSError, UserError):
        return max_bytes
    return size if max_bytes is None else min(size, max_bytes)


def _is_compressed(kind: FileKind) -> bool:
    return kind.compression is not None or (kind.format is not None and not kind.format.compressible)
