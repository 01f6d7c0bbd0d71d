"""How fast is training? Against the card's matrix rate, and against transformers.

    python benchmarks/train.py [1b] [8b] [entropy] [step] [peer] [profile] [--bytes 16384 65536]

Random weights in bfloat16, documents of 8,192 random bytes, random patches of 4.5 bytes; forward and backward,
compiled block by block as the trainer compiles them. Operations: `bytelatent.model.flops`, three times those
of a forward pass.

1b       the released shape;  8b: the paper's largest
entropy  the published entropy model: a training step, and forward
step     1b with clipping and optimizer: hash tables by dense gradients and by rows
peer     transformers' model of the released shape
profile  where the time of `1b` goes
"""

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from bytelatent.model import ByteLMSettings, ModelSettings, add_patches, build, compile_regions, pack_rows
from bytelatent.model.flops import costs
from bytelatent.model.loss import sum_of_nats
from bytelatent.model.presets import preset
from bytelatent.training.clipping import clip
from bytelatent.training.optimizer import build_optimizer
from bytelatent.training.settings import OptimizerSettings

DOCUMENT, PATCH_BYTES = 8192, 4.5


def random_batch(size: int, patched: bool = True) -> tuple[Any, torch.Tensor]:
    """A stream of `size` ids, and their targets."""
    generator = torch.Generator().manual_seed(0)
    rows = list(torch.randint(4, 260, [size], generator=generator).split(DOCUMENT))
    stream = pack_rows(rows)
    targets = torch.randint(4, 260, [size], generator=generator)
    if patched:
        starts = torch.rand(size, generator=generator) < 1 / PATCH_BYTES
        slots = -(-int(size / PATCH_BYTES * 1.03) // 128) * 128
        stream = add_patches(stream, starts, slots, history=stream.position)
    return stream.to("cuda"), targets.cuda()


def random_model(settings: ModelSettings) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return build(settings)
    finally:
        torch.set_default_dtype(torch.float32)


def seconds_of(work: Callable[[], Any], times: int = 10, warm: int = 3) -> float:
    for _ in range(warm):
        work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def matrix_rate() -> float:
    """FLOP/s of an 8192-cubed product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return 2 * 8192**3 / seconds_of(lambda: a @ b, 20)


def tell(name: str, settings: ModelSettings, size: int, seconds: float, rate: float, passes: int = 3) -> None:
    flops = passes * sum(part.flops_per_byte for part in costs(settings, PATCH_BYTES, DOCUMENT))
    speed = size / seconds
    print(
        f"{name}, {size:,} bytes: {speed:,.0f} bytes/s, {speed * flops / rate:.0%} of the matrix rate "
        f"({flops / 1e9:.2f} GFLOP a byte), {seconds * 1e3:.1f} ms, "
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
        flush=True,
    )


def forward_backward(model: Any, stream: Any, targets: torch.Tensor) -> Callable[[], None]:
    def work() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        sum_of_nats(model(stream), targets).div(len(targets)).backward()

    return work


def train(name: str, sizes: list[int], rate: float, rows: bool = True, profiled: bool = False) -> None:
    settings = preset(name)
    model = random_model(settings)
    build_optimizer(model, OptimizerSettings(hash_gradients="rows" if rows else "dense"))
    compile_regions(model)
    for size in sizes:
        torch._dynamo.reset()  # so that each size is compiled for itself
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        work = forward_backward(model, *random_batch(size))
        work()
        torch.cuda.synchronize()
        print(f"{name}: first step {time.perf_counter() - began:.0f} s")
        tell(f"{name}, hash gradients {'by rows' if rows else 'dense'}", settings, size, seconds_of(work), rate)
        if profiled:
            profile(work)


def profile(work: Callable[[], None]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        work()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows)
    print(f"kernels: {total / 2e3:.1f} ms a step")
    for row in rows[:26]:
        share = row.self_device_time_total / total
        print(f"{share:6.1%} {row.self_device_time_total / 2e3:8.2f} ms {row.count // 2:5d} x  {row.key[:100]}")


def entropy(rate: float) -> None:
    settings = preset("entropy")
    assert isinstance(settings, ByteLMSettings)
    model = random_model(settings)
    compile_regions(model)
    size = 65_536
    stream, targets = random_batch(size, patched=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    work = forward_backward(model, stream, targets)

    def step() -> None:
        work()
        clip(list(model.parameters()), 1.0)
        optimizer.step()

    tell("entropy model, a training step", settings, size, seconds_of(step), rate)

    @torch.no_grad()
    def forward() -> None:
        model(stream)

    tell("entropy model, forward", settings, size, seconds_of(forward), rate, passes=1)


def step(sizes: list[int], rate: float) -> None:
    settings = preset("blt-1b")
    for gradients in ("rows", "dense"):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model = random_model(settings)
        optimizer = build_optimizer(model, OptimizerSettings(hash_gradients=gradients))
        compile_regions(model)
        for size in sizes:
            torch._dynamo.reset()
            work = forward_backward(model, *random_batch(size))

            def whole(work: Callable[[], None] = work, model: Any = model, optimizer: Any = optimizer) -> None:
                work()
                clip(list(model.parameters()), 1.0)
                optimizer.step()

            tell(f"blt-1b, hash gradients {gradients}, forward and backward", settings, size, seconds_of(work), rate)
            tell(f"blt-1b, hash gradients {gradients}, whole step", settings, size, seconds_of(whole), rate)
        del model, optimizer


def peer(rate: float) -> None:
    """transformers' model of the released shape, patch lengths given, 2 x 8,192 bytes."""
    from transformers import BltConfig, BltForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model: Any = BltForCausalLM(BltConfig(use_cache=False))
    torch.set_default_dtype(torch.float32)
    model.model.patcher = None
    ids = torch.randint(4, 260, [2, DOCUMENT], device="cuda")
    lengths = torch.full([2, DOCUMENT // 4], 4, device="cuda")  # of 4 bytes: it takes the same number in each row

    def work() -> None:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=ids, patch_lengths=lengths, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()

    torch.cuda.reset_peak_memory_stats()
    tell("transformers", preset("blt-1b"), 2 * DOCUMENT, seconds_of(work, 4, 2), rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["1b", "step", "entropy", "8b", "peer"])
    parser.add_argument("--bytes", type=int, nargs="+", default=[16_384, 65_536])
    given = parser.parse_args()
    rate = matrix_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, matrices {rate / 1e12:.0f} TFLOP/s", flush=True)
    if "1b" in given.what or "profile" in given.what:
        train("blt-1b", given.bytes, rate, profiled="profile" in given.what)
    for name, work in {
        "step": lambda: step(given.bytes, rate),
        "entropy": lambda: entropy(rate),
        "8b": lambda: train("blt-8b", [16_384], rate),
        "peer": lambda: peer(rate),
    }.items():
        if name in given.what:
            gc.collect()
            torch.cuda.empty_cache()
            try:
                work()
            except torch.OutOfMemoryError as error:
                print(f"{name}: {str(error).splitlines()[0][:150]}", flush=True)


if __name__ == "__main__":
    main()
