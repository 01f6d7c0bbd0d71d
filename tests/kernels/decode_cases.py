"""What `test_decode_kernels.py` runs in Triton's interpreter, and anyone on a GPU: kernels beside their plain twins.

    python -m tests.kernels.decode_cases '[["skinny", {"M": 1, "N": 768, "K": 768}]]'

gives the largest differences of each case, as JSON; all of them are 0 or rounding.
"""

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytelatent.inference.sampling import SamplingSlots
from bytelatent.inference.settings import Sampling
from bytelatent.inference.step.patching import (
    append,
    choose,
    decide,
    plain_append,
    plain_choose,
    plain_decide,
    plain_store_patch,
    store_patch,
)
from bytelatent.inference.step.sampling import StepBuffers, draw, plain_draw
from bytelatent.kernels.decode_attention import (
    AttentionLaunch,
    decode_attention,
    plain_decode_attention,
    split_scratch,
)
from bytelatent.kernels.decode_cross_attention import (
    append_patch_byte,
    decoder_cross_attention_step,
    encoder_cross_attention_step,
    plain_append_patch_byte,
    plain_decoder_cross_attention_step,
    plain_encoder_cross_attention_step,
)
from bytelatent.kernels.hash_embed import hash_embed, ngram_powers, plain_hash_embed
from bytelatent.kernels.quantized_heads import dequantize_heads, quantize_heads
from bytelatent.kernels.rotary import cos_sin, rotary_embedding
from bytelatent.kernels.window_attention import BLOCK, first_seen, plain_window_attention, window_attention
from bytelatent.model.ngram_hash import PRIMES
from bytelatent.patching import PatchSettings
from bytelatent.vocab import VOCAB_SIZE
from tests.kernels.product_cases import Errors, difference, gating, leaving, skinny
from tests.kernels.streams import stream_of_sizes

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def attention(
    positions: list[int],
    slots: int,
    window: int | None,
    heads: int = 2,
    kv_heads: int = 2,
    dtype: str = "float32",
    rows: list[int] | None = None,
    splits: int = 1,
    steps: int = 1,
    head_dim: int = 16,
    in_8_bits: bool = False,
) -> Errors:
    """Some steps one after the other, over caches that hold what came before and are NaN elsewhere."""
    kind, size = getattr(torch, dtype), len(positions)
    cache_rows = max(rows or [size]) + 1
    table = rotary_embedding(torch.arange(max(positions) + steps), head_dim, 10_000.0)
    caches = [torch.full((cache_rows, slots, kv_heads, head_dim), torch.nan, dtype=kind) for _ in range(2)]
    for b, position in enumerate(positions):
        row = b if rows is None else rows[b]
        if row >= 0:
            held = torch.arange(max(position - slots, 0), position) % slots
            for cache in caches:
                cache[row, held] = torch.randn(len(held), kv_heads, head_dim).to(kind)
    scales: list[Tensor] = []
    if in_8_bits:  # 8 bits have no NaN: elsewhere they are 0
        caches, scales = map(list, zip(*(quantize_heads(cache.nan_to_num()) for cache in caches), strict=True))
    copies = [cache.nan_to_num() for cache in caches]  # the plain form may look at what it gives no weight
    scratch = split_scratch(size, heads, head_dim, splits, caches[0].device) if splits > 1 else None
    launch = AttentionLaunch(block=16, splits=splits, num_warps=4, num_stages=2)
    shared: dict = {"heads": heads, "window": window, "row_B": None if rows is None else torch.tensor(rows)}
    copied = [scale.clone() for scale in scales]
    worst: Errors = {"error": 0.0, "keys": 0.0, "values": 0.0}
    for step in range(steps):
        at = torch.tensor(positions, dtype=torch.int32) + step
        qkv = torch.randn(size, (heads + 2 * kv_heads) * head_dim).to(kind)
        out = [torch.full((size, heads * head_dim), torch.nan, dtype=kind) for _ in range(2)]
        before = [cache.clone() for cache in (*caches, *scales)]
        for run in (0, 1):
            flag = torch.tensor(run, dtype=torch.int32)
            decode_attention(
                qkv, *caches, at, table, **shared, scales=scales, out=out[0], scratch=scratch, launch=launch, run=flag
            )  # fmt: skip
            if not run:
                assert bool(out[0].isnan().all()), "a kernel that should not run wrote something"
                assert max(map(difference, (*caches, *scales), before)) == 0
        plain_decode_attention(qkv, *copies, at, table, **shared, scales=copied, out=out[1])
        held = [(cache.nan_to_num(), copy) for cache, copy in zip(caches, copies, strict=True)]
        if in_8_bits:
            every = zip((*scales, *copied), (*caches, *copies), strict=True)
            found = [dequantize_heads(values, scale, torch.float32) for scale, values in every]
            held = [(found[0], found[2]), (found[1], found[3])]
        errors = (difference(*out), *(difference(*pair) for pair in held))
        worst = {name: max(worst[name], error) for name, error in zip(worst, errors, strict=True)}
    return worst


def reading(
    sequences: int,
    keys: int,
    heads: int,
    kv_heads: int,
    dtype: str = "float32",
    rows: list[int] | None = None,
) -> Errors:
    kind = getattr(torch, dtype)
    q = torch.randn(sequences, heads, 16).to(kind)
    k, v = torch.randn(2, max(rows or [sequences]) + 1, keys, kv_heads, 16).to(kind)
    reads = torch.rand(sequences) < 0.7
    for row in range(sequences) if rows is None else [row for row in rows if row >= 0]:
        if not reads[row if rows is None else rows.index(row)]:
            k[row], v[row] = torch.nan, torch.nan  # what is not read does not matter
    out = torch.full((3, *q.shape), torch.nan, dtype=kind)
    shared: dict = {"row_T": None if rows is None else torch.tensor(rows)}
    decoder_cross_attention_step(q, k, v, reads, **shared, out=out[0], run=torch.ones(1, dtype=torch.int32))
    plain_decoder_cross_attention_step(q, k, v, reads, **shared, out=out[1])
    decoder_cross_attention_step(q, k, v, reads, **shared, out=out[2], run=torch.zeros(1, dtype=torch.bool))
    assert bool(out[2].isnan().all()), "a kernel that should not run wrote something"
    return {"error": difference(out[0], out[1])}


def gathering(
    counts: list[int],
    most: int,
    queries: int,
    heads: int,
    kv_heads: int,
    rows: list[int],
    dtype: str = "float32",
) -> Errors:
    """Bytes are cached one by one, then gathered."""
    kind, size, dim = getattr(torch, dtype), len(counts), 40
    q = torch.randn(len(rows), queries, heads, 16).to(kind)
    cached = [[torch.full((size, most, kv_heads, 16), torch.nan, dtype=kind) for _ in range(2)] for _ in range(2)]
    pooled = [torch.full((size, dim), torch.nan) for _ in range(2)]
    for number in range(max(counts)):
        at = torch.tensor([number if number < count else -1 for count in counts], dtype=torch.int32)
        kv, h = torch.randn(size, 2 * kv_heads, 16).to(kind), torch.randn(size, dim).to(kind)
        append_patch_byte(kv, *cached[0], at, h_BD=h, pooled_BD=pooled[0])
        plain_append_patch_byte(kv, *cached[1], at, h_BD=h, pooled_BD=pooled[1])
        append_patch_byte(
            kv + 1, *cached[0], at, h_BD=h + 1, pooled_BD=pooled[0], run=torch.zeros(1, dtype=torch.int32)
        )
    out = torch.full((3, *q.shape), torch.nan, dtype=kind)
    found = torch.tensor([max(counts[row], 0) for row in rows])
    shared: dict = {"count_C": found, "row_C": torch.tensor(rows, dtype=torch.int32)}
    encoder_cross_attention_step(q, *cached[0], **shared, out=out[0])
    plain_encoder_cross_attention_step(q, *cached[1], **shared, out=out[1])
    encoder_cross_attention_step(q, *cached[0], **shared, out=out[2], run=torch.zeros(1, dtype=torch.int32))
    assert bool(out[2].isnan().all()), "a kernel that should not run wrote something"
    return {
        "error": difference(out[0], out[1]),
        "cached": max(map(difference, cached[0], cached[1])),
        "pooled": difference(*pooled),
    }


def embedding(
    histories: list[int], new: int, functions: int, sizes: list[int], rows: int, dim: int, dtype: str = "float32"
) -> Errors:
    kind = getattr(torch, dtype)
    powers = ngram_powers(PRIMES[:functions], sizes)
    tail = torch.randint(0, 260, (len(histories) // new, new + max(sizes) + 1))
    tables, own = torch.randn(len(powers) * rows, dim).to(kind), torch.randn(260, dim).to(kind)
    history = torch.tensor(histories, dtype=torch.int32)
    out = torch.full((3, len(histories), dim), torch.nan)
    hash_embed(tail, history, powers, tables, own, new=new, out=out[0])
    plain_hash_embed(tail, history, powers, tables, own, new=new, out=out[1])
    hash_embed(tail, history, powers, tables, own, new=new, out=out[2], run=torch.zeros(1, dtype=torch.int32))
    assert bool(out[2].isnan().all()), "a kernel that should not run wrote something"
    return {"error": difference(out[0], out[1])}


def on_cpu(tensors: Any) -> Any:
    """A copy of a dataclass of tensors."""
    return type(tensors)(**{name: part.clone().cpu() for name, part in vars(tensors).items()})


def deciding(
    rows: int,
    max_closing: int,
    chosen: dict[str, Any],
    quorum: float = 0.0,
    decoded: bool = False,
    sampling: list[dict[str, Any]] | None = None,
    constrained: bool = False,
) -> Errors:
    """Draw, append, decide, choose, one after another, with the rows' states as they come."""
    patching = PatchSettings(**chosen)
    samplings = [Sampling(**values) for values in sampling or [{}]]
    drawing = SamplingSlots.empty(rows, DEVICE)
    for row in range(rows):
        prompt = torch.randint(4, 260, [5])
        is_constrained = constrained and row % 4 != 3
        drawing.put(row, samplings[row % len(samplings)], prompt, 3 + row % 4, is_constrained)
    state = SimpleNamespace(
        position=torch.randint(0, 6, [rows]),
        tail=torch.randint(0, 260, [rows, 4]),
        previous_entropy=torch.rand(rows) * 5,
        since_start=torch.randint(0, 5, [rows]),
        open_count=torch.randint(0, 9, [rows]),
        num_patches=torch.randint(0, 4, [rows]),
    )
    buffers = StepBuffers.empty(rows, max_closing, DEVICE)
    buffers.is_active.copy_(torch.rand(rows) < 0.8)
    buffers.is_waiting.copy_(buffers.is_active & (torch.rand(rows) < 0.3))
    ours, theirs = (drawing, state, buffers), tuple(map(on_cpu, (drawing, state, buffers)))
    errors: Errors = {}
    for number in range(3):
        logits, lm_logits = 3 * torch.randn(rows, 260), 2 * torch.randn(rows, 260)
        lm = lm_logits if patching.needs_entropies else None
        ready = [row for row in range(rows) if constrained and row % 4 != 3 and (row + number) % 3 == 0]
        allowed = [(np.arange(260) + row) % 7 == 2 for row in ready]  # others' are outdated, and their logits held
        ours[0].constrain(ready, allowed)
        theirs[0].constrain(ready, allowed)
        draw(logits, ours[0], ours[1].position, ours[2])
        append(ours[1], ours[2])
        decide(lm, patching, ours[1], ours[2])
        choose(ours[1], ours[2], quorum, decoded)
        with torch.device("cpu"):  # the only one that the plain forms are for
            plain_draw(logits.cpu(), theirs[0], theirs[1].position, theirs[2])
            plain_append(theirs[1], theirs[2])
            plain_decide(None if lm is None else lm.cpu(), patching, theirs[1], theirs[2])
            plain_choose(theirs[1], theirs[2], quorum, decoded)
        for one, other in zip(ours, theirs, strict=True):
            for name, found in vars(one).items():
                errors[f"{name} {number}"] = difference(found.cpu(), vars(other)[name])
    return errors


def deciding_on_every_id(chosen: dict[str, Any]) -> Errors:
    """Whether a patch starts after each id, with entropies of any size."""
    patching, size = PatchSettings(**chosen), VOCAB_SIZE
    buffers = StepBuffers.empty(size, 1, DEVICE)
    buffers.ids.copy_(torch.arange(size))
    buffers.reads.fill_(True)
    state = SimpleNamespace(
        position=torch.randint(1, 7, [size]),
        tail=torch.cat([torch.randint(0, size, [size, 3]), torch.arange(size)[:, None]], dim=1),
        previous_entropy=torch.rand(size) * 5,
        since_start=torch.randint(0, 5, [size]),
    )
    lm_logits = 8 * torch.rand(size, 1) * torch.randn(size, size) if patching.needs_entropies else None
    theirs, their_flags = on_cpu(state), on_cpu(buffers)
    decide(lm_logits, patching, state, buffers)
    with torch.device("cpu"):
        plain_decide(None if lm_logits is None else lm_logits.cpu(), patching, theirs, their_flags)
    found, expected = {**vars(state), "wants": buffers.wants}, {**vars(theirs), "wants": their_flags.wants}
    return {name: difference(part.cpu(), expected[name]) for name, part in found.items()}


def keeping(rows: int, closing: list[int], keys: int, heads: int, head_dim: int, layers: int) -> Errors:
    kv = torch.randn(len(closing) * keys, layers * 2 * heads * head_dim)
    tables = torch.randn(2, layers, rows, keys, heads, head_dim)
    expected = tables.clone()
    store_patch(kv, tables[0], tables[1], torch.tensor(closing))
    plain_store_patch(kv, expected[0], expected[1], torch.tensor(closing))
    return {"error": difference(tables, expected)}


def rounding(sizes: list[int], heads: int, head_dim: int) -> Errors:
    """Prompts whose keys and values are rounded to 8 bits in place."""
    size = -(-sum(sizes) // BLOCK) * BLOCK
    stream = stream_of_sizes(sizes, size - sum(sizes))
    qkv = torch.randn(size, 3, heads, head_dim)
    copy = qkv.clone()
    given = (first_seen(stream.position, None), *cos_sin(stream.position, head_dim, 10_000.0), True)
    found = window_attention(*qkv.unbind(1), *given)
    expected = plain_window_attention(*copy.unbind(1), *given)
    again = [dequantize_heads(*quantize_heads(x), x.dtype) for x in qkv.unbind(1)[1:]]
    return {
        "error": difference(found, expected),
        "keys": difference(qkv[:, 1], copy[:, 1]),
        "values": difference(qkv[:, 2], copy[:, 2]),
        "alike": max(map(difference, again, qkv.unbind(1)[1:])),
    }


CASES = {
    "skinny": skinny,
    "leaving": leaving,
    "attention": attention,
    "reading": reading,
    "gathering": gathering,
    "embedding": embedding,
    "deciding": deciding,
    "deciding_on_every_id": deciding_on_every_id,
    "keeping": keeping,
    "gating": gating,
    "rounding": rounding,
}


def run(cases: list[tuple[str, dict]]) -> list[Errors]:
    results = []
    for number, (name, arguments) in enumerate(cases):
        torch.manual_seed(number)
        results.append(CASES[name](**arguments))
    return results


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        torch.set_default_device("cuda")
    print(json.dumps(run(json.loads(sys.argv[1]))))
