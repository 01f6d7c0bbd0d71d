"""Bits per byte on text that is not trained on."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bytelatent.data import Batch, DataSettings, Patcher, batches_once
from bytelatent.errors import UserError
from bytelatent.model.loss import bits_per_byte
from bytelatent.progress import Progress
from bytelatent.text import BadRows, find_files
from bytelatent.text.bad_rows import TextError
from bytelatent.text.streams import is_remote
from bytelatent.training.checkpoint.manager import TrainState
from bytelatent.training.distributed.fsdp import free_gathered_weights
from bytelatent.training.distributed.plan import ParallelPlan
from bytelatent.training.settings import TrainSettings


def must_be_there(data: DataSettings, whence: str = "", remote: bool = True) -> None:
    """Complain about sources that hold no files.

    Args:
        whence: is said of relative paths: where they are looked for.
        remote: also those on other machines.

    Raises:
        UserError: it names the setting.
    """
    for key, sources in (("train", data.train), ("valid", data.valid)):
        for source in sources:
            if is_remote(source.path) and not remote:
                continue
            try:
                find_files(source.path)
            except TextError as error:
                way_out = "; or train without held-out text: data.valid=null" if key == "valid" else ""
                where = "" if Path(source.path).expanduser().is_absolute() else whence
                raise UserError(f"data.{key}: {error.line}{way_out}{where}") from None


def must_hold_text(data: DataSettings) -> None:
    """Complain about sources before the first step, not at the first validation."""
    must_be_there(data)
    bad = BadRows(data.max_bad_rows, "data.max_bad_rows")
    batches = batches_once(data.valid, data.context, data.batch_bytes, bad_rows=bad, max_row_bytes=data.max_row_bytes)
    if data.valid and next(batches, None) is None:
        raise UserError(f"data.valid: there is no text in {', '.join(repr(source.path) for source in data.valid)}")


def validate(
    state: TrainState,
    settings: TrainSettings,
    patcher: Patcher | None,
    loss: Callable[[Batch], torch.Tensor],
    device: torch.device,
    plan: ParallelPlan,
    limit: float | None = None,
) -> dict[str, Any]:
    """Bits per byte on the validation text, whose batches the ranks share out.

    Args:
        limit: seconds after which the rest of the text is left out; None reads all of it.
    """
    data = settings.data
    nats, num_bytes = 0.0, 0
    limits = settings.validation.max_bytes, data.batch_patches
    bad = BadRows(data.max_bad_rows, "data.max_bad_rows")
    rows = {"bad_rows": bad, "max_row_bytes": data.max_row_bytes}
    batches = batches_once(data.valid, data.context, data.batch_bytes, patcher, *limits, padded=True, **rows)

    def agreed(over: bool) -> bool:  # the first rank's clock counts
        return bool(plan.ranks.sum([over * plan.ranks.is_first])[0])

    state.model.eval()
    with torch.no_grad(), Progress("validating", settings.validation.max_bytes, limit, bar=False) as progress:
        for some in progress.within(_in_groups(batches, plan.data_world_size), agreed):
            # All ranks compute as often, as they need one another's weights; one without a batch does so in vain.
            own = some[plan.data_rank] if plan.data_rank < len(some) else None
            found = float(loss((own or some[0]).to(device)))
            if own is not None:
                nats += found
                num_bytes += own.num_bytes
            progress.advance(sum(batch.num_bytes for batch in some))
    state.model.train()
    free_gathered_weights(state.model)
    nats, num_bytes = plan.sum([nats, num_bytes])
    return {
        "step": state.step,
        "bytes_seen": state.bytes_seen,
        "validation_bits_per_byte": bits_per_byte(nats, int(num_bytes)),
        "validation_bytes": int(num_bytes),
    }


def _in_groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    while some := list(itertools.islice(batches, size)):
        yield some
