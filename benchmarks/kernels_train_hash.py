"""Hash tables in training: what do dense gradients cost, and rows?

    python benchmarks/kernels_train_hash.py [check] [time] [--bytes 16384 65536] [--rows 500002] [--weight-decay 0.1]

check  on the GPU: sums, gradients, a step of the optimizer and a compiled graph, against the CPU in float64
time   the tables of the released 1B shape: milliseconds of each part of a step, and the most memory it takes, for
       Python source (which looks up few rows) and random bytes (which look up as many as there can be); by rows also
       of what happens every 256 steps: that all rows catch up, most of which no step has looked up
"""

import argparse
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytelatent.kernels.row_adamw import HISTORY
from bytelatent.model.block import init_weights
from bytelatent.model.ngram_hash import NgramHashEmbedding
from bytelatent.model.settings import NgramHashSettings
from bytelatent.training.gradients import clip
from bytelatent.training.sparse_rows import SparseRowsAdamW
from bytelatent.vocab import OFFSET

DIM = 1024
PATCHING: dict[str, Any] = {"lr": 4e-4, "betas": (0.9, 0.95)}


def python_source(num_bytes: int) -> Tensor:
    text, files = bytearray(), iter(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    while len(text) < num_bytes:
        text += next(files).read_bytes()
    return torch.frombuffer(text[:num_bytes], dtype=torch.uint8).long() + OFFSET


def random_bytes(num_bytes: int) -> Tensor:
    return torch.randint(0, 256, (num_bytes,), generator=torch.Generator().manual_seed(0)) + OFFSET


def optimizer_of(model: NgramHashEmbedding, weight_decay: float) -> torch.optim.Optimizer:
    patching = {**PATCHING, "weight_decay": weight_decay}
    if model.tables.sparse:
        return SparseRowsAdamW(model.parameters(), **patching)
    return torch.optim.AdamW(model.parameters(), fused=model.tables.weight.is_cuda, **patching)


def check(weight_decay: float) -> None:
    """Raise if the GPU does not do what the CPU does."""
    ids, history = torch.cat([python_source(3000), torch.zeros(500, dtype=torch.long)]), torch.arange(3500) % 1300
    grads = torch.randn(3500, DIM, generator=torch.Generator().manual_seed(1))
    for sparse in (False, True):
        torch.manual_seed(0)
        exact = NgramHashEmbedding(NgramHashSettings(vocab_size=5003), DIM).double()
        init_weights(exact)
        model = NgramHashEmbedding(exact.settings, DIM).cuda()
        model.load_state_dict(exact.state_dict())
        exact.tables.sparse = model.tables.sparse = sparse
        ours, theirs = optimizer_of(model, weight_decay), optimizer_of(exact, weight_decay)
        for run in (model, torch.compile(model, fullgraph=True)):
            found, expected = run(ids.cuda(), history.cuda()), exact(ids, history)
            report("sums", found, expected)
            expected.backward(grads.double())
            gradients = []
            for out in (found, run(ids.cuda(), history.cuda())):
                model.zero_grad()
                out.backward(grads.cuda())
                gradients.append(gradient_of(model).to_dense())
            assert torch.equal(*gradients), "the same batch, another gradient"
            report("gradient", gradients[0], gradient_of(exact).to_dense())
            report("norm", clip(model.parameters(), 1.0), clip(exact.parameters(), 1.0))
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
            report("weights", model.tables.weight, exact.tables.weight)


def gradient_of(model: NgramHashEmbedding) -> Tensor:
    gradient = model.tables.weight.grad
    assert gradient is not None
    return gradient


def report(name: str, found: Tensor, expected: Tensor) -> None:
    found, expected = found.detach().cpu().double(), expected.detach().double()
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    print(f"{name}: largest difference {error:.1e}, of at most {scale:.1e}", flush=True)
    assert error < 3e-5 * max(scale, 1.0), f"{name}: the GPU differs"


def time_parts(parts: dict[str, Callable[[], object]], repeats: int = 10) -> dict[str, float]:
    """Milliseconds of each part of a step, one after the other."""
    totals = dict.fromkeys(parts, 0.0)
    for number in range(repeats + 3):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        marks[0].record()
        for part, mark in zip(parts.values(), marks[1:], strict=True):
            part()
            mark.record()
        torch.cuda.synchronize()
        for name, before, after in zip(parts, marks, marks[1:], strict=False):
            totals[name] += before.elapsed_time(after) if number >= 3 else 0.0
    return {name: total / repeats for name, total in totals.items()}


def time_step(ids: Tensor, rows: int, sparse: bool, text: str, weight_decay: float) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = NgramHashEmbedding(NgramHashSettings(vocab_size=rows), DIM)
        history, grads = torch.arange(len(ids)), torch.randn(len(ids), DIM)
    torch.nn.init.normal_(model.tables.weight, std=DIM**-0.5)
    model.tables.sparse = sparse
    optimizer, ids, out = optimizer_of(model, weight_decay), ids.cuda(), []
    if isinstance(optimizer, SparseRowsAdamW):
        optimizer.before_lookups(model)
    parts: dict[str, Callable[[], object]] = {
        "forward": lambda: out.append(model(ids, history)),
        "backward": lambda: out.pop().backward(grads),
        "clip": lambda: clip(model.parameters(), 1.0, num_passes=1),
        "optimizer": lambda: (optimizer.step(), optimizer.zero_grad(set_to_none=True)),
    }
    taken = time_parts(parts)
    model(ids, history).backward(grads)
    seen = f"{gradient_of(model)._indices().unique().numel():,} rows seen, " if sparse else ""
    each = ", ".join(f"{name} {milliseconds:.2f}" for name, milliseconds in taken.items())
    print(
        f"{len(ids):,} bytes of {text}, {'rows' if sparse else 'dense'}: {sum(taken.values()):.2f} ms ({each}), "
        f"{seen}{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most",
        flush=True,
    )
    if isinstance(optimizer, SparseRowsAdamW):
        state = optimizer.state[model.tables.weight]
        state["step"].fill_(HISTORY)

        def fall_behind() -> None:
            state["last"].copy_(state["until"].clamp(max=16))

        late = time_parts({"": fall_behind, "all rows": optimizer.catch_up})["all rows"]
        print(f"    all rows after {HISTORY} steps, weight decay {weight_decay:g}: {late:.2f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", default=["check", "time"], choices=["check", "time"])
    parser.add_argument("--bytes", type=int, nargs="*", default=[16_384, 65_536])
    parser.add_argument("--rows", type=int, default=500_002, help="of each of the 6 tables")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if "check" in arguments.modes:
        check(arguments.weight_decay)
    if "time" in arguments.modes:
        for num_bytes in arguments.bytes:
            for text, ids in (("source", python_source(num_bytes)), ("noise", random_bytes(num_bytes))):
                for sparse in (False, True):
                    time_step(ids, arguments.rows, sparse, text, arguments.weight_decay)


if __name__ == "__main__":
    main()
