"""Bits per byte of any model on text: `blt eval`, also as `python -m bytelatent.eval`."""

import sys

if __name__ == "__main__":  # before what takes seconds to import, so that Ctrl-C is heard
    from bytelatent.__main__ import main

    main(["eval", *sys.argv[1:]])

from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from bytelatent.data import DataSettings, Patcher, batches_once
from bytelatent.device import choose_device
from bytelatent.errors import UserError
from bytelatent.evaluation import evaluate
from bytelatent.interop import load
from bytelatent.text import find_files


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
    for source in sources:
        find_files(source.path)  # complain before the bar appears
    context = found.config.context
    batches = batches_once(sources, context, max(context, 4096), patcher, max_bytes)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=max_bytes)
        result = evaluate(found.model.to(place), batches, on_batch=lambda n: progress.advance(task, n))
    return {"model": found.source, **asdict(result)}
