"""What `scale.py calls` does: the operations that the host starts in a step of the trainer, counted."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scale_measure import Training, attempt, failed_row, joined, underline
from scale_plans import Configuration
from torch.profiler import ProfilerActivity, profile

HEAD = "| ranks | model | plan | hash tables | operations | of FSDP | optimizer | collectives | read by the host |"
WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::nonzero_numpy")  # a GPU: the host waits


def calls_of(work: Callable[[], Any]) -> Counter[str]:
    """Operations that are not called by another one, by the part that starts them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    found: Counter[str] = Counter()
    for event in profiler.events() or ():
        if not event.name.startswith(("aten::", "c10d::", "fsdp::")):
            continue
        above, names = event.cpu_parent, []
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        if any(name.startswith(("aten::", "c10d::", "fsdp::")) for name in names):
            continue
        found["all"] += 1
        found["waits"] += event.name in WAITS  # of itself: other operations read values only on a CPU
        found["fsdp"] += any(name.startswith("FSDP::") for name in names) or event.name.startswith("fsdp::")
        found["optimizer"] += any(name.startswith("Optimizer.step") for name in names)
        found["collectives"] += event.name.startswith("c10d::")
    return found


def count_calls(texts: Sequence[str], size: int) -> None:
    """Print a table, one line for each configuration; on a CPU, block by block and not compiled."""
    with joined("cpu") as (ranks, aside, device):

        def show(line: str) -> None:
            if ranks.is_first:
                print(line, flush=True)

        def work(of: Configuration) -> None:
            training = Training(of, ranks, device, torch.float32, compiled=False)
            training.step()
            found = calls_of(training.step)
            numbers = [found[part] for part in ("all", "fsdp", "optimizer", "collectives", "waits")]
            show(f"| {' | '.join([*cells(of), *map(str, numbers)])} |")

        def cells(of: Configuration) -> list[str]:
            return [str(ranks.world_size), of.name, of.words, of.tables]

        show(f"{HEAD}\n{underline(HEAD)}")
        for of in (Configuration.parse(text, size) for text in texts):
            failed = attempt(lambda of=of: work(of), aside, device)
            if failed is not None:
                show(failed_row(HEAD, [*cells(of), failed]))
