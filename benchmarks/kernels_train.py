"""Patch attention in training: are its kernels right, and how fast? Against plain PyTorch and the card's copies.

    python benchmarks/kernels_train.py [check] [time] [tune] [--bytes 16384 65536]

The shape is the released 1B's: K = 2, 16 heads of 64, patches of 4.5 bytes in the mean, a tenth of the slots unused.
Attention takes bfloat16, as under autocast; pooling takes float32 states.

check    results and gradients against the plain form in float64, at 16,384 bytes: plainly, with 4,096 bytes of padding
         (one long run), compiled; and the same once more, bit for bit
time     milliseconds of the forward pass and of both, caches cold, beside the plain form, eager and compiled. The bytes
         moved are those of inputs and outputs, each once a pass; the copy rate counts bytes read and written
tune     the kernels with other blocks: rows at once, blocks on their way, elements of a row
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bytelatent.kernels import patch_attention as kernels
from bytelatent.kernels import patch_pooling
from bytelatent.kernels.patch_attention import ByteRanges
from bytelatent.model import PatchedStream, Stream, add_patches, pack_rows

PATCH_BYTES, K, HEADS, HEAD_DIM = 4.5, 2, 16, 64
CHECKED = 16_384  # bytes


@dataclass(frozen=True)
class Work:
    """One operation beside its plain form, with inputs."""

    name: str
    kernel: Callable[..., Tensor]
    twin: Callable[..., Tensor]
    inputs: list[Tensor]
    kept: int = 0  # bytes that the forward pass writes for the backward pass only


def stream(num_bytes: int, padding: int = 0) -> PatchedStream:
    """Documents of 4,096 bytes, then padding."""
    generator = torch.Generator().manual_seed(0)
    packed = pack_rows([torch.randint(4, 260, (4096,), generator=generator) for _ in range(num_bytes // 4096)])
    text = torch.arange(num_bytes) < num_bytes - padding
    document = torch.where(text, packed.document, -1)
    position = torch.where(text, packed.position, torch.arange(num_bytes) - (num_bytes - padding))
    starts = (torch.rand(num_bytes, generator=generator) < 1 / PATCH_BYTES) & text
    made = add_patches(Stream(packed.ids, document, position), starts)
    return add_patches(Stream(packed.ids, document, position), starts, round(made.num_patches * 1.1)).to("cuda")


def works(num_bytes: int, padding: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[Work]:
    batch = stream(num_bytes, padding)
    own, read = ByteRanges.of(batch.patch, batch.num_patches), ByteRanges.of(batch.read, batch.num_patches)
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(kind)

    of_bytes, of_patches = (num_bytes, HEADS, HEAD_DIM), (batch.num_patches, K, HEADS, HEAD_DIM)
    exact = 4 * batch.num_patches * K * HEADS * (HEAD_DIM + 1)
    return [
        Work("pool", *pooling(own), [random(num_bytes, HEADS * HEAD_DIM, kind=torch.float32)]),
        Work("own bytes", *gathering(own), [random(*of_patches), random(*of_bytes), random(*of_bytes)], kept=exact),
        Work("read patch", *reading(read), [random(*of_bytes), random(*of_patches), random(*of_patches)]),
    ]


def pooling(own: ByteRanges) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return lambda h: patch_pooling.pool_operator(h, own.begin), lambda h: patch_pooling.plain_pool_patches(h, own)


def gathering(own: ByteRanges) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return (
        lambda q, k, v: kernels.own_bytes_operator(q, k, v, own.begin)[0],
        lambda q, k, v: kernels.plain_encoder_cross_attention(q, k, v, own),
    )


def reading(read: ByteRanges) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return (
        lambda q, k, v: kernels.read_patch_operator(q, k, v, read.patch_T, read.begin),
        lambda q, k, v: kernels.plain_decoder_cross_attention(q, k, v, read),
    )


def results(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """What the function gives, and its gradients."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(out.shape)
    weights = weights.to(inputs[0].dtype).to(out.dtype)  # the same values for all
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def check(work: Work, case: str) -> None:
    """Print the differences, as shares of the largest value, and complain if rounding does not explain them."""
    right = results(work.twin, work.inputs, torch.float64)
    found = results(work.kernel, work.inputs)
    again = results(work.kernel, work.inputs)
    compiled = results(torch.compile(work.kernel, fullgraph=True), work.inputs)

    def differences(these: list[Tensor]) -> list[float]:
        return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(these, right, strict=True)]

    errors = differences(found)
    bound = 0.01 if work.inputs[0].dtype == torch.bfloat16 else 1e-5
    faults = [] if max(errors) < bound else ["WRONG"]
    if not all(a.equal(b) for a, b in zip(found, again, strict=True)):
        faults.append("NOT REPEATED")
    if not all(a.equal(b) for a, b in zip(found, compiled, strict=True)):
        faults.append("COMPILED DIFFERS")
    shown = ", ".join(f"{error:.1e}" for error in errors)
    print(f"{work.name}, {case}: differences {shown}; {' '.join(faults) or 'right'}", flush=True)


def check_not_a_number(work: Work, case: str) -> None:
    """It is not lost in a maximum."""
    h = work.inputs[0].clone()
    h[::1000, ::7] = torch.nan
    alike = work.kernel(h).isnan().equal(work.twin(h).isnan())
    print(f"{work.name}, {case}: {'right' if alike else 'WRONG'}", flush=True)


def milliseconds(work: Callable[[], object], times: int = 20) -> float:
    """The median time on the device, with nothing useful in its caches, as a CUDA graph: without the host's part."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    other = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    found = []
    for _ in range(times):
        other.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def both(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """The forward and the backward pass."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    d_out = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, d_out)


def forward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    def work() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return work


def bytes_moved(work: Work) -> tuple[int, int]:
    """Of the forward pass, and of both."""
    read = sum(x.nbytes for x in work.inputs)
    out = work.kernel(*work.inputs).nbytes
    once = read + out + work.kept
    pooled = out if work.name == "pool" else 0  # is read again to find which bytes are as high
    return once, once + read + work.kept + pooled + out + read


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / milliseconds(lambda: target.copy_(source)) * 1e3


def show(call: Callable[[], float]) -> str:
    """Milliseconds, or why there are none."""
    try:
        return f"{call():.3f}"
    except Exception as error:  # the next one may do
        torch.cuda.empty_cache()
        return f"({type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''})"


def time(work: Work, case: str, rate: float) -> None:
    once, twice = bytes_moved(work)
    one = milliseconds(forward(work.kernel, work.inputs))
    two = milliseconds(both(work.kernel, work.inputs))
    compiled = torch.compile(work.twin)
    print(
        f"{work.name}, {case}: "
        f"forward {one:.3f} ms ({once / 2**20:,.0f} MiB, {once / one * 1e3 / rate:.0%} of the copy rate), "
        f"both {two:.3f} ms ({twice / 2**20:,.0f} MiB, {twice / two * 1e3 / rate:.0%}); "
        f"plain {show(lambda: milliseconds(both(work.twin, work.inputs)))} ms, "
        f"compiled {show(lambda: milliseconds(both(compiled, work.inputs)))} ms",
        flush=True,
    )


def tune(work: Work, case: str) -> None:
    """Every choice of blocks; the fastest three of each pass."""
    modules: Any = (kernels, patch_pooling)
    before = [(module, module.BLOCK, module.STAGES, module.WIDTH) for module in modules]
    found: list[tuple[float, float, Any]] = []
    for block, stages, width in itertools.product((2, 4, 8, 16), (1, 2, 3), (128, 256, 512)):
        for module in modules:
            module.BLOCK, module.STAGES, module.WIDTH = block, stages, width
        try:
            one = milliseconds(forward(work.kernel, work.inputs))
            found.append((one, milliseconds(both(work.kernel, work.inputs)) - one, (block, stages, width)))
        except Exception as error:  # too much shared memory, perhaps
            print(f"{work.name}, {case}, {(block, stages, width)}: {type(error).__name__}", flush=True)
    for module, *numbers in before:
        module.BLOCK, module.STAGES, module.WIDTH = numbers
    for number, name in enumerate(("forward", "backward")):
        best = sorted(found, key=lambda one: one[number])[:3]
        shown = ", ".join(f"{one[number]:.3f} ms {one[2]}" for one in best)
        print(f"{work.name}, {case}, {name} by (rows, stages, width): {shown}", flush=True)


def attempt(what: Callable[..., None], work: Work, case: str, *arguments: Any) -> None:
    """Say what went wrong, and go on."""
    try:
        what(work, case, *arguments)
    except Exception as error:
        print(f"{work.name}, {case}: {type(error).__name__}: {error}", flush=True)
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", default=["check", "time"], help="check, time, tune")
    parser.add_argument("--bytes", nargs="+", type=int, default=[16_384, 65_536])
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if "check" in arguments.modes:
        for padding, dtype in itertools.product((0, 4096), (torch.bfloat16, torch.float32)):
            for work in works(CHECKED, padding, dtype):
                attempt(check, work, f"{padding:,} bytes of padding, {work.inputs[0].dtype}")
        pool = works(CHECKED)[0]
        alike = replace(pool, inputs=[x.round().bfloat16() for x in pool.inputs])
        attempt(check, alike, "many bytes equally high, torch.bfloat16")
        attempt(check_not_a_number, pool, "not a number")
    if "time" in arguments.modes:
        rate = copy_rate()
        print(f"copies: {rate / 1e12:.2f} TB/s", flush=True)
        for num_bytes in arguments.bytes:
            for padding in (0, 4096):
                for work in works(num_bytes, padding):
                    attempt(time, work, f"{num_bytes:,} bytes, {padding:,} of them padding", rate)
    if "tune" in arguments.modes:
        for num_bytes in arguments.bytes:
            for work in works(num_bytes):
                attempt(tune, work, f"{num_bytes:,} bytes")


if __name__ == "__main__":
    main()
