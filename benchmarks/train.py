"""How fast is training? Against the card's matrix rate, and against transformers.

    python benchmarks/train.py [1b] [float8] [8b] [entropy] [step] [patching] [memory] [peer]
        [--bytes 16384 65536] [--shapes blt-1b blt-8b] [--flex] [--profile]

Random weights, documents of 8,192 random bytes, random patches of 4.5 bytes; compiled block by block as the trainer
compiles them. Operations: `bytelatent.model.flops`, three times those of a forward pass. With --flex attention is
FlexAttention's also where cuDNN would be taken.

1b       the released shape, weights in bfloat16, as published peers are timed, kernel by kernel and as a CUDA graph;
         8b: the paper's largest
float8   shapes in bfloat16 and in each recipe of 8-bit floats (torchao), with all matrices of the global transformer,
         and with those that `bytelatent.training.distributed.float8` expects to gain
entropy  the published entropy model, weights in bfloat16: a training step, and forward
step     1b as it is trained: float32 weights, products in bfloat16, clipping, optimizer, hash tables by rows; from
         65,536 bytes on with the blocks computed again in the backward pass, since 80 GB hold no more; below that
         forward and backward pass as a CUDA graph, too. (`blt bench train` measures other settings, and says where the
         time goes.)
patching what `1b` with 65,536 bytes takes longer where the published entropy model finds the patches of each batch:
         before it is trained on, and as the trainer does, while the last one is
memory   speed and memory of some shapes with nothing, all but products and attention (selective), or all (full)
         computed again in the backward pass; weights in bfloat16
peer     transformers' model of the released shape

With --profile the longest kernels, and the time of each kind, are printed too.
"""

import argparse
import gc
import time
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, get_args

import torch
from gpu_trace import print_kernels
from torch import Tensor

from bytelatent.data import Batch, Patcher, Piece, PrefetchLoader, pack, split_document, stream_of
from bytelatent.inference import FastEntropies
from bytelatent.model import (
    ByteLM,
    ByteLMSettings,
    ModelSettings,
    PatchedStream,
    Stream,
    build_model,
    compile_regions,
    preset,
)
from bytelatent.model.flops import training_flops
from bytelatent.patching import PatchSettings
from bytelatent.text import Document
from bytelatent.training.distributed.float8 import to_float8
from bytelatent.training.distributed.parallelize import apply_activation_checkpointing
from bytelatent.training.distributed.settings import ActivationCheckpointing, Float8, ParallelSettings
from bytelatent.training.gradients import clip
from bytelatent.training.optimizer import build_optimizer
from bytelatent.training.profiling.measure import (
    DOCUMENT,
    PATCH_BYTES,
    SLOTS,
    ForwardBackward,
    SyntheticTraining,
    TrainingSetup,
    matrix_rate,
    random_batch,
    seconds_of,
)
from bytelatent.training.settings import OptimizerSettings

CUDA, BF16, FLOAT32 = torch.device("cuda"), torch.bfloat16, torch.float32
RECOMPUTED = 65_536  # bytes from which `step` computes blocks again


def batch_of(size: int, patched: bool = True, flex: bool = False) -> tuple[Stream, Tensor]:
    stream, targets = random_batch(size, CUDA, patched)
    return replace(stream, num_documents=None) if flex else stream, targets


def random_model(settings: ModelSettings) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with CUDA:
            return build_model(settings)
    finally:
        torch.set_default_dtype(torch.float32)


def show_row(name: str, settings: ModelSettings, size: int, seconds: float, rate: float, passes: int = 3) -> None:
    flops = passes / 3 * training_flops(settings, PATCH_BYTES, DOCUMENT)
    speed = size / seconds
    print(
        f"{name}, {size:,} bytes: {speed:,.0f} bytes/s, {speed * flops / rate:.0%} of the matrix rate "
        f"({flops / 1e9:.2f} GFLOP a byte), {seconds * 1e3:.1f} ms, "
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
        flush=True,
    )


def leave_nothing() -> None:
    """Give back the memory of what was measured before: models are held by cycles, and by what was compiled."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def show_memory(name: str, error: RuntimeError) -> None:
    """While the error is handled, so that all is there that was there as it was met."""
    held, reserved = torch.cuda.memory_allocated() / 2**30, torch.cuda.memory_reserved() / 2**30
    line = str(error).splitlines()[0][:150]
    print(f"{name}: {line} ({held:.1f} GiB allocated, {reserved:.1f} reserved)", flush=True)


def train(
    name: str,
    sizes: list[int],
    rate: float,
    float8: Float8 | None = None,
    gaining: bool = False,
    profiled: bool = False,
    captured: bool = False,
    flex: bool = False,
    checkpointing: ActivationCheckpointing = "none",
) -> None:
    settings = preset(name)
    model = random_model(settings)
    num_patches = max(sizes) / PATCH_BYTES if gaining else None
    to_float8(model, float8, num_patches, ParallelSettings(activation_checkpointing=checkpointing))
    build_optimizer(model, OptimizerSettings(hash_gradients="rows"))
    apply_activation_checkpointing(model, checkpointing)
    compile_regions(model)
    forward_backward = ForwardBackward(model, CUDA, FLOAT32, captured)  # no autocast
    name = f"{name}{', FlexAttention' if flex else ''}, {'a CUDA graph' if captured else 'kernel by kernel'}"
    name += f", checkpointing {checkpointing}" if checkpointing != "none" else ""
    for size in sizes:
        forward_backward.forget_shapes()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        work = partial(forward_backward, *batch_of(size, flex=flex))
        work()
        torch.cuda.synchronize()
        print(f"{name}: first step {time.perf_counter() - began:.0f} s")
        what = f"{name}, hash gradients by rows" + (
            f", float8 {float8}{' where it gains' if gaining else ''}" if float8 else ""
        )
        show_row(what, settings, size, seconds_of(work, CUDA), rate)
        if profiled:
            print_kernels(work, CUDA)


def in_float8(shapes: list[str], sizes: list[int], rate: float, profiled: bool) -> None:
    ways = [(None, False), *product(get_args(Float8), (False, True))]
    for name, size, (float8, gaining) in product(shapes, sizes, ways):
        leave_nothing()
        try:
            train(name, [size], rate, float8, gaining, profiled=profiled)
        except torch.OutOfMemoryError as error:
            show_memory(f"{name}, {size:,} bytes, float8 {float8}", error)


def memory(shapes: list[str], sizes: list[int], rate: float, flex: bool) -> None:
    for name, size, checkpointing in product(shapes, sizes, get_args(ActivationCheckpointing)):
        leave_nothing()
        try:
            train(name, [size], rate, flex=flex, checkpointing=checkpointing)
        except torch.OutOfMemoryError as error:
            show_memory(f"{name}, {size:,} bytes, checkpointing {checkpointing}", error)


def entropy(rate: float, flex: bool, profiled: bool) -> None:
    settings = preset("entropy")
    assert isinstance(settings, ByteLMSettings)
    model = random_model(settings)
    compile_regions(model)
    size, forward_backward = 65_536, ForwardBackward(model, CUDA, FLOAT32)
    stream, targets = batch_of(size, patched=False, flex=flex)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        forward_backward(stream, targets)
        clip(list(model.parameters()), 1.0)
        optimizer.step()

    show_row("entropy model, a training step", settings, size, seconds_of(step, CUDA), rate)
    if profiled:
        print_kernels(step, CUDA)

    @torch.no_grad()
    def forward() -> None:
        model(stream)

    show_row("entropy model, forward", settings, size, seconds_of(forward, CUDA), rate, passes=1)
    if profiled:
        print_kernels(forward, CUDA)


def step(sizes: list[int], rate: float, flex: bool, profiled: bool) -> None:
    smaller = [size for size in sizes if size < RECOMPUTED]
    for captured, those in ((False, sizes), (True, smaller)):
        for size in those:
            leave_nothing()
            print(f"blt-1b, {size:,} bytes: {torch.cuda.memory_allocated() / 2**30:.1f} GiB before", flush=True)
            try:
                step_of(size, rate, flex, profiled, captured)
            except RuntimeError as error:  # too little memory, or what a capture makes of that
                show_memory(f"blt-1b, {size:,} bytes", error)


def step_of(size: int, rate: float, flex: bool, profiled: bool, captured: bool) -> None:
    """A function of its own, so that nothing of one size is there with the next."""
    settings, checkpointing = preset("blt-1b"), "none" if size < RECOMPUTED else "full"
    optimizer = OptimizerSettings(hash_gradients="rows")
    plan = TrainingSetup(settings, CUDA, BF16, True, optimizer, checkpointing=checkpointing, captured=captured)
    trainee = SyntheticTraining(plan)
    batch = batch_of(size, flex=flex)
    way = f"checkpointing {checkpointing}, {'a CUDA graph' if captured else 'kernel by kernel'}"
    torch.cuda.reset_peak_memory_stats()  # once: a graph's memory is counted as it is captured
    for name, work in (("gradients", trainee.forward_backward), ("step", trainee.step)):
        seconds = seconds_of(partial(work, *batch), CUDA)
        show_row(f"blt-1b as trained, {way}, {name}", settings, size, seconds, rate)
        if profiled:
            print_kernels(partial(work, *batch), CUDA)


class OneText:
    """In place of a loader: always the same text, its patches found anew for each batch."""

    def __init__(self, patcher: Patcher, pieces: list[Piece], slots: int | None = None):
        self.patcher, self.pieces, self.slots = patcher, pieces, slots

    def __next__(self) -> Batch:
        return pack(self.patcher(self.pieces), slots=self.slots)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


def patching(size: int = 65_536) -> None:
    torch.manual_seed(0)
    with CUDA:
        byte_lm = build_model(preset("entropy"))
    assert isinstance(byte_lm, ByteLM)
    entropies_of = FastEntropies(byte_lm)
    text = torch.randint(0, 256, [size // DOCUMENT, DOCUMENT - 2], dtype=torch.uint8)
    pieces = [piece for row in text for piece in split_document(Document(bytes(row.tolist())), DOCUMENT)]
    threshold = float(entropies_of(stream_of(pieces, CUDA)).quantile(1 - 1 / PATCH_BYTES))
    patcher = Patcher(PatchSettings(threshold=threshold), byte_lm, BF16, entropies_of=entropies_of)
    found = seconds_of(lambda: patcher(pieces), CUDA)
    stored = next(OneText(patcher, pieces))
    assert isinstance(stored.stream, PatchedStream)
    slots = (stored.stream.num_patches // SLOTS + 2) * SLOTS  # some more: rounding may find another patch
    loader = OneText(patcher, pieces, slots)
    stored = next(loader)
    print(f"patching, {size:,} bytes: {found * 1e3:.1f} ms a batch alone; {stored.num_patches:,} patches", flush=True)

    model = random_model(preset("blt-1b"))
    build_optimizer(model, OptimizerSettings(hash_gradients="rows"))
    compile_regions(model)
    forward_backward = ForwardBackward(model, CUDA, FLOAT32)  # no autocast

    def train_on(batch: Batch) -> None:
        forward_backward(batch.stream, batch.targets)

    before = seconds_of(lambda: train_on(stored), CUDA)
    before_each = seconds_of(lambda: train_on(next(loader)), CUDA)
    with PrefetchLoader(loader, CUDA) as batches:  # pyright: ignore[reportArgumentType]
        ahead = seconds_of(lambda: train_on(next(batches)), CUDA)
    print(
        f"blt-1b, hash gradients by rows, {size:,} bytes: {before * 1e3:.1f} ms with patches that are known", flush=True
    )
    for name, seconds in (("before each batch", before_each), ("while the last batch is trained on", ahead)):
        print(f"  patches found {name}: {seconds * 1e3:.1f} ms, {seconds / before - 1:+.1%}", flush=True)
    print(f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)


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
    show_row("transformers", preset("blt-1b"), 2 * DOCUMENT, seconds_of(work, CUDA, 4, 2), rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["1b", "float8", "step", "entropy", "patching", "8b", "peer"])
    parser.add_argument("--bytes", type=int, nargs="+", default=[16_384, 65_536])
    parser.add_argument("--shapes", nargs="+", default=["blt-400m", "blt-1b", "blt-8b"], help="of memory and float8")
    parser.add_argument("--flex", action="store_true")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    rate = matrix_rate(CUDA, BF16)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, matrices {rate / 1e12:.0f} TFLOP/s", flush=True)
    if "1b" in given.what:
        for captured in (False, True):
            leave_nothing()
            train("blt-1b", given.bytes, rate, profiled=given.profile, captured=captured, flex=given.flex)
    for name, work in {
        "float8": lambda: in_float8(given.shapes, given.bytes, rate, given.profile),
        "step": lambda: step(given.bytes, rate, given.flex, given.profile),
        "entropy": lambda: entropy(rate, given.flex, given.profile),
        "patching": patching,
        "memory": lambda: memory(given.shapes, given.bytes, rate, given.flex),
        "8b": lambda: train("blt-8b", [16_384], rate, flex=given.flex),
        "peer": lambda: peer(rate),
    }.items():
        if name in given.what:
            leave_nothing()
            try:
                work()
            except torch.OutOfMemoryError as error:
                show_memory(name, error)


if __name__ == "__main__":
    main()
