"""What `test_patch_attention.py` runs in Triton's interpreter, and anyone on a GPU: kernels beside their plain twins.

    python -m tests.kernels.patch_attention_cases '[["pool", {"stream": {"sizes": [9], "share": 0.3}, "dim": 40}]]'

gives, for each case, the largest differences to the plain form in float64, of results and gradients, as JSON. They are
shares of what rounding explains, so none may be above 1.
"""

import json
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor, library

from bytelatent.kernels import patch_attention as kernels
from bytelatent.kernels import patch_pooling
from bytelatent.kernels.patch_attention import ByteRanges
from tests.model.tiny import patched_stream_of, random_ids, random_starts

Errors = dict[str, float]

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def own_and_read(
    sizes: list[int], share: float, padding: int = 0, more_slots: int = 0
) -> tuple[ByteRanges, ByteRanges]:
    """The ranges of a stream of documents of these sizes in which a `share` of the bytes starts a patch.

    Some of the patches are left empty, and some bytes in the middle of a document read nothing.
    """
    generator = torch.Generator().manual_seed(sum(sizes))
    documents = [random_ids(generator, size) for size in sizes]
    starts = [random_starts(generator, size, share) for size in sizes]
    batch = patched_stream_of(documents, starts, padding, more_slots)
    skipped = torch.randint(0, 2, [batch.num_patches], generator=generator).cumsum(0)  # empty slots, also at the start
    place, slots = torch.arange(batch.num_patches) + skipped, batch.num_patches + int(skipped[-1])
    read = torch.where(batch.read >= 0, place[batch.read.clamp(min=0)], -1)
    read = torch.where(torch.rand(read.shape, generator=generator) < 0.1, -1, read)
    own, read = place[batch.patch].to(DEVICE), read.to(DEVICE)
    return ByteRanges.of(own, slots), ByteRanges.of(read, slots)


def compare(
    kernel: Callable[..., Tensor], twin: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype
) -> Errors:
    """Kernel and plain form in `dtype` beside the plain form in float64; rounding explains what the plain form does."""
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    d_out = torch.randn_like(twin(*inputs.values()))
    found, plainly, right = (
        results_of(function, {name: x.to(kind) for name, x in inputs.items()}, d_out.to(kind))
        for function, kind in ((kernel, dtype), (twin, dtype), (twin, torch.float64))
    )
    errors = {}
    for name, expected in right.items():
        assert found[name].dtype == dtype
        assert not found[name].isnan().any(), f"{name}: something was not written"
        scale = float(expected.abs().max())
        rounding = float((plainly[name] - expected).abs().max())
        errors[name] = float((found[name] - expected).abs().max()) / (4 * rounding + 5e-6 * scale + 1e-9)
    return errors


def results_of(function: Callable[..., Tensor], inputs: dict[str, Tensor], d_out: Tensor) -> dict[str, Tensor]:
    """What the function gives, and its gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(*leaves.values())
    found = {"out": out.detach()}
    for name, gradient in zip(leaves, torch.autograd.grad(out, list(leaves.values()), d_out), strict=True):
        found[f"d_{name}"] = gradient
    return found


def strided(*shape: int) -> Tensor:
    """Random values that are not contiguous."""
    return torch.randn(shape[0], 2, *shape[1:], device=DEVICE)[:, 0]


def pool(stream: dict, dim: int, dtype: str = "float32", levels: int = 0) -> Errors:
    """With `levels`, states of few values, the highest of which is 0: many are equally high."""
    own, _ = own_and_read(**stream)
    h = strided(len(own.patch_T), dim)
    if levels:
        h = -torch.randint(0, levels, h.shape, device=DEVICE).float()
    kind = getattr(torch, dtype)
    return compare(
        lambda h: patch_pooling.pool_operator(h, own.begin),
        lambda h: patch_pooling.plain_pool_patches(h, own),
        {"h": h},
        kind,
    )


def own_bytes(
    stream: dict, k: int, heads: int, head_dim: int, dtype: str = "float32", scale: float = 1.0, block: int = 4
) -> Errors:
    kernels.BLOCK = block
    own, _ = own_and_read(**stream)
    inputs = {"q": scale * strided(own.num_patches, k, heads, head_dim)}
    inputs |= {name: strided(len(own.patch_T), heads, head_dim) for name in "kv"}
    return compare(
        lambda q, k, v: kernels.own_bytes_operator(q, k, v, own.begin)[0],
        lambda q, k, v: kernels.plain_encoder_cross_attention(q, k, v, own),
        inputs,
        getattr(torch, dtype),
    )


def read_patch(
    stream: dict, k: int, heads: int, head_dim: int, dtype: str = "float32", scale: float = 1.0, block: int = 4
) -> Errors:
    kernels.BLOCK = block
    _, read = own_and_read(**stream)
    inputs = {"q": scale * strided(len(read.patch_T), heads, head_dim)}
    inputs |= {name: strided(read.num_patches, k, heads, head_dim) for name in "kv"}
    return compare(
        lambda q, k, v: kernels.read_patch_operator(q, k, v, read.patch_T, read.begin),
        lambda q, k, v: kernels.plain_decoder_cross_attention(q, k, v, read),
        inputs,
        getattr(torch, dtype),
    )


def operators() -> Errors:
    """What torch asks of an operator: schema, gradients, shapes without values, compiled graphs."""
    own, read = own_and_read([9, 5], 0.4)
    q, patches = torch.randn(14, 2, 16, requires_grad=True), torch.randn(own.num_patches, 2, 2, 16, requires_grad=True)
    library.opcheck(patch_pooling.pool_operator, (q.flatten(1), own.begin))
    library.opcheck(kernels.own_bytes_operator, (patches, q, q.flip(0), own.begin))
    library.opcheck(kernels.read_patch_operator, (q, patches, patches.flip(0), read.patch_T, read.begin))
    return {}


CASES = {f.__name__: f for f in (pool, own_bytes, read_patch, operators)}


def run(cases: list[tuple[str, dict]]) -> list[Errors]:
    results = []
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not written with NaN
    try:
        for number, (name, arguments) in enumerate(cases):
            torch.manual_seed(number)
            results.append(CASES[name](**arguments))
    finally:
        torch.use_deterministic_algorithms(False)
    return results


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
