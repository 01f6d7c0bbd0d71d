"""How fast is training? Against the card's matrix rate, and against transformers.

    python benchmarks/train.py [1b] [float8] [8b] [entropy] [step] [patching] [peer]
        [--bytes 16384 65536] [--flex] [--profile]

Random weights, documents of 8,192 random bytes, random patches of 4.5 bytes; compiled block by block as the trainer
compiles them. Operations: `bytelatent.model.flops`, three times those of a forward pass. With --flex attention is
FlexAttention's also where cuDNN would be taken.

1b       the released shape, weights in bfloat16, as published peers are timed, kernel by kernel and as a CUDA graph;
         8b: the paper's largest
float8   1b with the global transformer's products in 8-bit floats, a scale for each row (torchao)
entropy  the published entropy model, weights in bfloat16: a training step, and forward
step     1b as it is trained: float32 weights, products in bfloat16, clipping, optimizer, hash tables by rows; from
         65,536 bytes on with the blocks computed again in the backward pass, since 80 GB hold no more. (`blt bench
         train` measures other settings, and says where the time goes.)
patching what a batch costs more where the published entropy model finds its patches, beside stored ones
peer     transformers' model of the released shape

With --profile the longest kernels, and the time of each kind, are printed too.
"""

import argparse
import gc
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bytelatent.data import Patcher, cut
from bytelatent.inference import FastEntropies
from bytelatent.model import ByteLM, ByteLMSettings, ModelSettings, Stream, build, compile_regions
from bytelatent.model.flops import training_flops
from bytelatent.model.presets import preset
from bytelatent.patching import PatchSettings
from bytelatent.text import Document
from bytelatent.training.clipping import clip
from bytelatent.training.float8 import to_float8
from bytelatent.training.measure import (
    DOCUMENT,
    PATCH_BYTES,
    ForwardBackward,
    Plan,
    Trainee,
    matrix_rate,
    random_batch,
    seconds_of,
)
from bytelatent.training.optimizer import build_optimizer
from bytelatent.training.recompute import Checkpointing
from bytelatent.training.settings import Float8, OptimizerSettings
from bytelatent.training.time_spent import print_kernels

CUDA, BF16, FLOAT32 = torch.device("cuda"), torch.bfloat16, torch.float32


def batch_of(size: int, patched: bool = True, flex: bool = False) -> tuple[Stream, Tensor]:
    stream, targets = random_batch(size, CUDA, patched)
    return replace(stream, num_documents=None) if flex else stream, targets


def random_model(settings: ModelSettings) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return build(settings)
    finally:
        torch.set_default_dtype(torch.float32)


def tell(name: str, settings: ModelSettings, size: int, seconds: float, rate: float, passes: int = 3) -> None:
    flops = passes / 3 * training_flops(settings, PATCH_BYTES, DOCUMENT)
    speed = size / seconds
    print(
        f"{name}, {size:,} bytes: {speed:,.0f} bytes/s, {speed * flops / rate:.0%} of the matrix rate "
        f"({flops / 1e9:.2f} GFLOP a byte), {seconds * 1e3:.1f} ms, "
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
        flush=True,
    )


def train(
    name: str,
    sizes: list[int],
    rate: float,
    float8: Float8 | None = None,
    profiled: bool = False,
    captured: bool = False,
    flex: bool = False,
) -> None:
    settings = preset(name)
    model = random_model(settings)
    to_float8(model, float8)
    build_optimizer(model, OptimizerSettings(hash_gradients="rows"))
    compile_regions(model)
    forward_backward = ForwardBackward(model, CUDA, FLOAT32, captured)  # no autocast
    name = f"{name}{', FlexAttention' if flex else ''}, {'a CUDA graph' if captured else 'kernel by kernel'}"
    for size in sizes:
        forward_backward.forget_shapes()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        work = partial(forward_backward, *batch_of(size, flex=flex))
        work()
        torch.cuda.synchronize()
        print(f"{name}: first step {time.perf_counter() - began:.0f} s")
        what = f"{name}, hash gradients by rows" + (f", float8 {float8}" if float8 else "")
        tell(what, settings, size, seconds_of(work, CUDA), rate)
        if profiled:
            print_kernels(work, CUDA)


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

    tell("entropy model, a training step", settings, size, seconds_of(step, CUDA), rate)
    if profiled:
        print_kernels(step, CUDA)

    @torch.no_grad()
    def forward() -> None:
        model(stream)

    tell("entropy model, forward", settings, size, seconds_of(forward, CUDA), rate, passes=1)
    if profiled:
        print_kernels(forward, CUDA)


def step(sizes: list[int], rate: float, flex: bool, profiled: bool) -> None:
    settings = preset("blt-1b")
    for size in sizes:
        gc.collect()
        torch.cuda.empty_cache()
        checkpointing: Checkpointing = "none" if size < 65_536 else "full"
        plan = Plan(
            settings,
            CUDA,
            BF16,
            compiled=True,
            optimizer=OptimizerSettings(hash_gradients="rows"),
            checkpointing=checkpointing,
        )
        trainee = None
        try:
            trainee = Trainee(plan)
            batch = batch_of(size, flex=flex)
            for name, work in (("gradients", trainee.forward_backward), ("step", trainee.step)):
                torch.cuda.reset_peak_memory_stats()
                seconds = seconds_of(partial(work, *batch), CUDA)
                tell(f"blt-1b as trained, checkpointing {checkpointing}, {name}", settings, size, seconds, rate)
                if profiled:
                    print_kernels(partial(work, *batch), CUDA)
        except torch.OutOfMemoryError as error:
            print(f"blt-1b, {size:,} bytes: {str(error).splitlines()[0][:150]}", flush=True)
        del trainee


def patching() -> None:
    size = 65_536
    torch.manual_seed(0)
    with torch.device("cuda"):
        byte_lm = build(preset("entropy"))
    assert isinstance(byte_lm, ByteLM)
    patcher = Patcher(PatchSettings(threshold=5.0), byte_lm, BF16, entropies_of=FastEntropies(byte_lm))
    text = torch.randint(0, 256, [size // DOCUMENT, DOCUMENT - 2], dtype=torch.uint8)
    pieces = [piece for row in text for piece in cut(Document(bytes(row.tolist())), DOCUMENT)]
    seconds = seconds_of(lambda: patcher(pieces), CUDA)
    print(f"patching by the entropy model, {size:,} bytes: {seconds * 1e3:.1f} ms a batch", flush=True)


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
    tell("transformers", preset("blt-1b"), 2 * DOCUMENT, seconds_of(work, CUDA, 4, 2), rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["1b", "float8", "step", "entropy", "patching", "8b", "peer"])
    parser.add_argument("--bytes", type=int, nargs="+", default=[16_384, 65_536])
    parser.add_argument("--flex", action="store_true")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    rate = matrix_rate(CUDA, BF16)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, matrices {rate / 1e12:.0f} TFLOP/s", flush=True)
    if "1b" in given.what:
        for captured in (False, True):
            gc.collect()
            torch.cuda.empty_cache()
            train("blt-1b", given.bytes, rate, profiled=given.profile, captured=captured, flex=given.flex)
    for name, work in {
        "float8": lambda: train("blt-1b", given.bytes, rate, "rowwise", given.profile, flex=given.flex),
        "step": lambda: step(given.bytes, rate, given.flex, given.profile),
        "entropy": lambda: entropy(rate, given.flex, given.profile),
        "patching": patching,
        "8b": lambda: train("blt-8b", [16_384], rate, flex=given.flex),
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
