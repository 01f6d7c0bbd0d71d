"""The loss on held-out text while a model trains, on all ranks."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bytelatent.data import Batch
from bytelatent.progress import Progress
from bytelatent.training.distributed.parallelize import ParallelPlan, free_gathered_weights


def held_out_loss(
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    batches: Iterator[Batch],
    plan: ParallelPlan,
    device: torch.device,
    max_bytes: int | None,
    limit: float | None = None,
) -> tuple[float, int]:
    """Summed nats of the batches, the same on all ranks, and the number of their bytes.

    Args:
        loss: the model's, in summed nats.
        batches: the same on all ranks, which divide them.
        max_bytes: of text, at most; None: not known.
        limit: seconds after which the rest is left out.
    """
    nats, num_bytes = 0.0, 0

    def agreed(over: bool) -> bool:  # the first rank's clock counts
        return bool(plan.ranks.sum([over * plan.ranks.is_first])[0])

    groups = iter(lambda: list(itertools.islice(batches, plan.data_world_size)), [])
    model.eval()
    with torch.no_grad(), Progress("validating", max_bytes, limit, bar=False) as progress:
        for group in progress.within(groups, agreed):
            # All ranks compute equally often, as they need one another's weights; one without a batch computes the
            # first one and drops the result.
            own = group[plan.data_rank] if plan.data_rank < len(group) else None
            found = float(loss((own or group[0]).to(device)))
            if own is not None:
                nats += found
                num_bytes += own.target_bytes
            progress.advance(sum(batch.num_bytes for batch in group))
    model.train()
    free_gathered_weights(model)
    total, counted = plan.sum([nats, num_bytes])
    return total, int(counted)
