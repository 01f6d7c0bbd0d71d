"""The loss on held-out text."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bytelatent.data import Batch
from bytelatent.progress import Progress
from bytelatent.training.distributed.plan import ParallelPlan, free_gathered_weights


@torch.no_grad()
def loss_on(
    batches: Iterator[Batch],
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    plan: ParallelPlan,
    device: torch.device,
    max_bytes: int | None,
    limit: float | None,
) -> tuple[float, int]:
    """Nats and bytes of batches that the ranks share.

    Args:
        loss: the model's, summed over a batch.
        max_bytes: of all batches, for the progress bar.
        limit: seconds after which the rest of the text is left out; None reads all of it.
    """
    nats, num_bytes = 0.0, 0

    def agreed(over: bool) -> bool:  # the first rank's clock counts
        return bool(plan.ranks.sum([over * plan.ranks.is_first])[0])

    groups = iter(lambda: list(itertools.islice(batches, plan.data_world_size)), [])
    model.eval()
    with Progress("validating", max_bytes, limit, bar=False) as progress:
        for group in progress.within(groups, agreed):
            # All ranks compute equally often, as they need one another's weights; one without a batch computes the
            # first one and drops the result.
            own = group[plan.data_rank] if plan.data_rank < len(group) else None
            found = float(loss((own or group[0]).to(device)))
            if own is not None:
                nats += found
                num_bytes += own.num_bytes
            progress.advance(sum(batch.num_bytes for batch in group))
    model.train()
    free_gathered_weights(model)
    nats, num_bytes = plan.sum([nats, num_bytes])
    return nats, int(num_bytes)
