"""Is a GPU right, and how fast is it? First the numbers, then the times.

    python benchmarks/device.py [--preset blt-1b] [--bytes 16384]

Correctness: logits on the GPU (FlexAttention) against the CPU (explicit masks), float32, with windows, several
documents and padding; a perturbed id outside the window must change nothing. Speed: forward and backward, bf16,
compiled, random patches of mean 4.5 bytes.
"""

import argparse
import time

import torch
import torch.nn.functional as F

from bytelatent.model import (
    BLTModel,
    BLTSettings,
    ByteLM,
    ByteLMSettings,
    PatchedStream,
    add_patches,
    build_model,
    compile_regions,
    pack_rows,
    preset,
)
from bytelatent.model.attention import build_mask
from bytelatent.model.flops import costs
from bytelatent.model.settings import CrossAttentionSettings, NgramHashSettings, StackSettings


def stream(sizes: list[int], patch_bytes: float, slots: int | None = None) -> PatchedStream:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 260, (size,), generator=generator) for size in sizes]
    starts = torch.rand(sum(sizes), generator=generator) < 1 / patch_bytes
    return add_patches(pack_rows(rows), starts, slots)


def small_blt() -> BLTSettings:
    stack = StackSettings(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, window=100, multiple_of=32)
    middle = StackSettings(dim=96, num_layers=2, num_heads=4, multiple_of=32)
    return BLTSettings(
        encoder=stack,
        global_transformer=middle,
        decoder=stack,
        cross_attention=CrossAttentionSettings(k=2, num_heads=4),
        ngram_hash=NgramHashSettings(vocab_size=1009),
    )


@torch.no_grad()
def check() -> None:
    """Raise if the GPU's logits are not the CPU's."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    batch = stream([700, 33, 1, 250, 129], 4.5)
    torch.manual_seed(0)
    blt = BLTModel(small_blt())
    byte_lm = ByteLM(ByteLMSettings(dim=64, num_layers=2, num_heads=4, window=100, multiple_of=32))
    for name, model in (("BLT", blt), ("byte LM", byte_lm)):
        expected = model(batch)
        model.to("cuda")
        found = model(batch.to("cuda")).cpu()
        print(f"{name}: largest difference of logits {(found - expected).abs().max():.2e}")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    changed = batch.to("cuda")
    before = byte_lm(changed)
    changed.ids[10] = 4 + (changed.ids[10] - 4 + 1) % 256
    differs = (byte_lm(changed) - before).abs().amax(dim=-1).cpu() > 0
    seen = 10 + 2 * 99  # two layers of a window of 100
    assert bool(differs[10]), "a changed id must change its own logits"
    assert not differs[:10].any(), "a later id reached back"
    assert not differs[seen + 1 : 700].any(), "an id reached over its window"
    assert not differs[700:].any(), "an id reached another document"
    print("masks: nothing leaks")


def check_gradients() -> None:
    """Raise if gradients through masks, in bfloat16, are not those of float64 on the CPU.

    All scores of the first head are about -120, as in a trained model whose heads look at nothing.
    """
    for size in (63, 64, 192, 320, 1000, 1088):
        generator = torch.Generator().manual_seed(size)
        q, k, v, weight = torch.randn(4, size, 4, 32, generator=generator).bfloat16().unbind(0)
        q[:, 0], k[:, 0] = 0.1 * q[:, 0], 0.1 * k[:, 0]
        q[:, 0, 0], k[:, 0, 0] = 1, -120 * 32**0.5
        document = (torch.arange(size) > size // 3).long()
        wanted, found = (
            _gradients([x.to(device, dtype) for x in (q, k, v, weight)], document.to(device))
            for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16))
        )
        for name, one, other in zip("qkv", wanted, found, strict=True):
            assert other.isfinite().all(), f"{size} positions: the gradient of {name} is not finite"
            # Not of the first head, whose large keys cancel: bfloat16 keeps little of that on any device.
            error = (one[:, 1:] - other[:, 1:].cpu().double()).norm() / one[:, 1:].norm()
            assert error < 0.02, f"{size} positions: the gradient of {name} differs by {error:.2g}"
    print("masks: gradients are finite and equal")


def _gradients(tensors: list[torch.Tensor], document: torch.Tensor) -> tuple[torch.Tensor, ...]:
    *inputs, weight = tensors
    inputs = [x.requires_grad_() for x in inputs]
    out = build_mask(document, None).attend(inputs[0], inputs[1], inputs[2])
    return torch.autograd.grad((out * weight).sum(), inputs)


def speed(name: str, num_bytes: int, sizes: list[int], compiled: bool) -> None:
    settings = preset(name)
    batch = stream(sizes, 4.5, slots=round(num_bytes / 4.5 * 1.1)).to("cuda")
    targets = torch.randint(4, 260, (num_bytes,), device="cuda")
    with torch.device("cuda"):
        model = build_model(settings)
    if compiled:
        compile_regions(model)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(batch), targets, reduction="sum") / num_bytes
        loss.backward()
        model.zero_grad(set_to_none=True)

    began = time.perf_counter()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    warm, began = time.perf_counter() - began, time.perf_counter()
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / 10
    flops = 3 * sum(part.flops_per_byte for part in costs(settings, 4.5, max(sizes)))
    print(
        f"{name} {'compiled' if compiled else 'eager'}, {len(sizes)} x {sizes[0]:,} bytes: "
        f"{num_bytes / seconds:,.0f} bytes/s, {flops * num_bytes / seconds / 1e12:.0f} TFLOP/s, "
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, warm-up {warm:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="blt-1b")
    parser.add_argument("--bytes", type=int, default=16_384)
    parser.add_argument("--documents", type=int, default=2)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    check()
    check_gradients()
    sizes = [arguments.bytes // arguments.documents] * arguments.documents
    for compiled in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        speed(arguments.preset, sum(sizes), sizes, compiled)


if __name__ == "__main__":
    main()
