"""A step in plain PyTorch: its decisions, which `bytelatent.kernels.decode_step` must equal, and what a CPU does faster
than the forms beside the other kernels, which are written to be read.

With a few rows each operation costs a CPU more than what it computes. So there are few of them, and those on a few
numbers are NumPy's, over the same memory: they cost a third of PyTorch's. PyTorch also shares the smallest softmax and
product of several rows among its threads; with another program on the machine each wait for them can take milliseconds.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.inference.sampling import SamplingSlots
from bytelatent.kernels.decode_step import Flags
from bytelatent.kernels.quantized import Matrix, dense
from bytelatent.model import entropies
from bytelatent.patching import PatchSettings, PatchState, step
from bytelatent.vocab import EOS

SMALL = 1 << 18  # multiplications of a product, for which OpenBLAS, NumPy's on most machines, uses one thread

# Shapes: B rows, C places, V vocabulary, M rows of a product, K its width or keys a patch, N its results or tables,
# R slots of a ring, H query heads, J key/value heads, G queries that share one, E head size, A angles, W longest n-gram


class Arrays:
    """The tensors of a dataclass as arrays over the same memory, to read and to write."""

    def __init__(self, tensors: Any):
        self._tensors = tensors

    def __getattr__(self, name: str) -> np.ndarray:
        return _array(getattr(self._tensors, name))


@lru_cache(maxsize=1024)  # a view takes as long as the operation that it saves
def _array(tensor: Tensor) -> np.ndarray:
    return tensor.numpy()


def plain_draw(
    logits_BV: Tensor, rows: SamplingSlots, position: Tensor, flags: Flags, expected: Tensor | None = None
) -> None:
    """What `draw` does."""
    arrays, at = Arrays(flags), position.numpy()
    is_active, is_waiting = arrays.is_active, arrays.is_waiting
    draws = is_active & ~is_waiting
    drawn, log_probability = rows.draw(logits_BV)
    ids = drawn.numpy()
    if expected is not None:
        agrees = ids == expected.numpy()
        is_waiting |= draws & ~agrees
        draws &= agrees
    rows.read(drawn, torch.from_numpy(draws))
    ends = draws & ((ids == EOS) | (rows.remaining.numpy() <= 0))
    reads = draws & ~ends
    is_active &= ~ends
    arrays.drawn[:] = np.where(draws, ids, -1)
    arrays.log_probability[:] = log_probability.numpy()
    arrays.ids[:] = ids
    arrays.reads[:] = reads
    arrays.row[:] = np.where(reads, np.arange(len(ids)), -1)
    arrays.at[:] = np.maximum(at - ~reads, 0)


def plain_choose(state: Any, flags: Flags, quorum: float, decoded: bool) -> None:
    """What `choose` does."""
    arrays, counts = Arrays(flags), Arrays(state)
    wants, reads, is_waiting = arrays.wants, arrays.reads, arrays.is_waiting
    num_patches, open_count = counts.num_patches, counts.open_count
    arrays.closing[:] = -1
    arrays.number[:] = 0
    arrays.closing_count[:] = 0
    served = np.zeros_like(wants)
    if wants.any() and wants.sum() >= quorum * (wants | reads).sum():
        urgency = wants.astype(int) + (wants & is_waiting)
        order = np.argsort(-urgency, kind="stable")[: len(flags.closing)]
        order = order[wants[order]]
        arrays.closing[: len(order)] = order
        arrays.number[: len(order)] = num_patches[order]
        arrays.closing_count[: len(order)] = open_count[order]
        served[order] = True
        open_count[order] = 0
        num_patches[order] += 1
    arrays.run[:] = served.any()
    goes_on = (reads & ~wants) | served
    arrays.goes_on[:] = np.where(served if decoded else goes_on, np.arange(len(wants)), -1)
    is_waiting[:] = wants & ~goes_on
    arrays.reads_patch[:] = num_patches > 0


def plain_keep_patch(kv: Tensor, patch_k: Tensor, patch_v: Tensor, closing: Tensor) -> None:
    """What `keep_patch` does."""
    layers, _, keys, heads, size = patch_k.shape
    kv_CKY2HE = kv.view(len(closing), keys, layers, 2, heads, size)
    for place, row in enumerate(closing.tolist()):
        if row >= 0:
            patch_k[:, row] = kv_CKY2HE[place, :, :, 0].transpose(0, 1)
            patch_v[:, row] = kv_CKY2HE[place, :, :, 1].transpose(0, 1)


def plain_append(state: Any, flags: Flags) -> None:
    """What `append` does."""
    arrays, counts = Arrays(flags), Arrays(state)
    reads, tail, open_count = arrays.reads, counts.tail, counts.open_count
    np.copyto(tail, np.concatenate([tail[:, 1:], arrays.ids[:, None]], axis=1), where=reads[:, None])
    counts.position[:] += reads
    arrays.count[:] = np.where(reads, open_count, -1)
    open_count += reads
    arrays.reads_patch[:] = counts.num_patches > 0


def plain_decide(lm_logits_BV: Tensor | None, patching: PatchSettings, state: Any, flags: Flags) -> None:
    """What `decide` does."""
    found = None if lm_logits_BV is None else entropies(lm_logits_BV)
    before = PatchState(state.position - 1, state.tail[:, -2], state.previous_entropy, state.since_start)
    after, starts = step(before, flags.ids, found, patching)
    arrays, counts = Arrays(flags), Arrays(state)
    for name in ("previous_entropy", "since_start"):
        np.copyto(getattr(counts, name), getattr(after, name).numpy(), where=arrays.reads)
    arrays.wants[:] = (starts.numpy() & arrays.reads) | arrays.is_waiting


def hash_embed(
    tail_BL: Tensor, history_B: Tensor, powers_NW: Tensor, tables_NVD: Tensor, embedding_D: Tensor
) -> Tensor:
    """What `plain_hash_embed` computes for one new byte of each sequence."""
    num_tables, widest = powers_NW.shape
    newest_BW = tail_BL.numpy()[:, ::-1][:, :widest]
    back = np.arange(newest_BW.shape[1])
    counted_BW = np.where(back <= history_B.numpy()[:, None], newest_BW, 0)
    size = len(tables_NVD) // num_tables
    rows_BN = counted_BW @ powers_NW.numpy().T[: len(back)] % size + np.arange(num_tables) * size  # int64 wraps
    x_BD = F.embedding(torch.from_numpy(rows_BN), tables_NVD).float().sum(1)
    return x_BD.add_(F.embedding(tail_BL[:, -1], embedding_D)).to(embedding_D.dtype)


def attend(
    qkv: Tensor,
    cache_k_CRJE: Tensor,
    cache_v_CRJE: Tensor,
    position_B: Tensor,
    rotary_PA2: Tensor,
    *,
    heads: int,
    window: int | None,
    row_B: Tensor,
    new: int = 1,
    run: Tensor | None = None,
) -> Tensor:
    """What `plain_decode_attention` computes, all sequences at once, one new position after another."""
    if new > 1:
        each = qkv.view(-1, new, qkv.shape[1])
        same: Any = {"heads": heads, "window": window, "row_B": row_B, "run": run}
        found = [
            attend(each[:, at], cache_k_CRJE, cache_v_CRJE, position_B + at, rotary_PA2, **same) for at in range(new)
        ]
        return torch.stack(found, dim=1).flatten(0, 1)
    _, slots, kv_heads, head_dim = cache_k_CRJE.shape
    if run is not None and not bool(run):
        return qkv.new_zeros(len(qkv), heads * head_dim)
    if len(row_B) == 1 and _is_float32(qkv, cache_k_CRJE):
        return _attend_one(qkv, cache_k_CRJE, cache_v_CRJE, int(position_B), rotary_PA2, heads, window, int(row_B))
    q_k, v_BJE = qkv.unflatten(-1, (-1, head_dim)).split([heads + kv_heads, kv_heads], dim=1)
    q_BHE, k_BJE = _turned(q_k, rotary_PA2[position_B][:, None]).split([heads, kv_heads], dim=1)
    row, slot = row_B.clamp(min=0), position_B % slots
    if bool((row_B < 0).any()):  # sequences that are passed over write nothing
        here = (row_B >= 0).nonzero()[:, 0]
        cache_k_CRJE[row[here], slot[here]], cache_v_CRJE[row[here], slot[here]] = k_BJE[here], v_BJE[here]
    else:
        cache_k_CRJE[row, slot], cache_v_CRJE[row, slot] = k_BJE, v_BJE
    size = min(int(position_B.max()) + 1, slots)
    newest = position_B[:, None]
    held = newest - (newest - torch.arange(size, device=qkv.device)) % slots
    seen = held >= 0 if window is None else (held >= 0) & (held > newest - window)
    kept = (part[row, :size].transpose(1, 2) for part in (cache_k_CRJE, cache_v_CRJE))
    found = F.scaled_dot_product_attention(
        q_BHE[:, :, None], *kept, attn_mask=seen[:, None, None], enable_gqa=heads != kv_heads
    )
    return found[:, :, 0].flatten(1)


def _attend_one(
    qkv: Tensor,
    cache_k_CRJE: Tensor,
    cache_v_CRJE: Tensor,
    position: int,
    rotary_PA2: Tensor,
    heads: int,
    window: int | None,
    row: int,
) -> Tensor:
    """The same for one sequence, whose cache need not be gathered."""
    _, slots, kv_heads, head_dim = cache_k_CRJE.shape
    if row < 0:
        return qkv.new_zeros(1, heads * head_dim)
    new = qkv.numpy().reshape(-1, head_dim)
    rotation_A = rotary_PA2.numpy()[position].view(np.complex64)[:, 0]
    turned = (new[: heads + kv_heads].view(np.complex64) * rotation_A).view(np.float32)
    k_RJE, v_RJE = cache_k_CRJE.numpy()[row], cache_v_CRJE.numpy()[row]
    slot, size = position % slots, min(position + 1, slots)
    k_RJE[slot], v_RJE[slot] = turned[heads:], new[heads + kv_heads :]
    first = slots - 1 - slot
    hidden = None if window is None or size <= window else _hidden(slots, window)[first : first + size]
    found = _read(turned[:heads].reshape(kv_heads, -1, head_dim), k_RJE[:size], v_RJE[:size], hidden)
    return torch.from_numpy(found.reshape(1, -1))


def _read(q_JGE: np.ndarray, k_RJE: np.ndarray, v_RJE: np.ndarray, hidden_R: np.ndarray | None = None) -> np.ndarray:
    """Attention of G queries of each of J heads, [J, G, E]; `hidden_R` is added to the scores."""
    scores_JGR = (q_JGE * q_JGE.shape[-1] ** -0.5) @ k_RJE.transpose(1, 2, 0)
    if hidden_R is not None:
        scores_JGR += hidden_R
    scores_JGR -= scores_JGR.max(-1, keepdims=True)
    weight_JGR = np.exp(scores_JGR, out=scores_JGR)
    weight_JGR /= weight_JGR.sum(-1, keepdims=True)
    return weight_JGR @ v_RJE.transpose(1, 0, 2)


@lru_cache(maxsize=16)
def _hidden(slots: int, window: int) -> np.ndarray:
    """What the position at the last slot of a ring adds to the scores of the slots, float32 [2R-1]: -inf beyond the
    window. The position at slot s adds what begins R-1-s further on.
    """
    back = (slots - 1 - np.arange(2 * slots - 1)) % slots
    return np.where(back < window, 0, -np.inf).astype(np.float32)


def _turned(x: Tensor, rotary: Tensor) -> Tensor:
    """Pairs (2i, 2i+1) rotated: as complex numbers multiplied by cosine and sine."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.view_as_complex(rotary)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def read_patch(
    q_THE: Tensor, k_BKHE: Tensor, v_BKHE: Tensor, reads_T: Tensor, *, row_B: Tensor, run: Tensor | None = None
) -> Tensor:
    """What `plain_read_patch` computes for one byte of each sequence, with as many heads of keys as of queries."""
    if len(row_B) == 1 and _is_float32(q_THE, k_BKHE):
        row = int(row_B)
        if row < 0 or not bool(reads_T):
            return torch.zeros_like(q_THE)
        found_H1E = _read(q_THE.numpy().transpose(1, 0, 2), k_BKHE.numpy()[row], v_BKHE.numpy()[row])
        return torch.from_numpy(found_H1E.transpose(1, 0, 2))
    row = row_B.clamp(min=0)
    k, v = k_BKHE[row], v_BKHE[row]
    weight = ((q_THE[:, None] * k).sum(-1, keepdim=True) * q_THE.shape[-1] ** -0.5).softmax(1)
    return (weight * v).sum(1) * reads_T[:, None, None]


def gather_bytes(
    q_CKHE: Tensor,
    k_BLHE: Tensor,
    v_BLHE: Tensor,
    count_C: Tensor,
    *,
    begin_C: Tensor | None = None,
    row_C: Tensor,
    run: Tensor | None = None,
) -> Tensor:
    """What `plain_gather_bytes` computes, with as many heads of keys as of queries."""
    out = torch.zeros_like(q_CKHE)
    if run is not None and not bool(run):
        return out
    begins = [0] * len(out) if begin_C is None else begin_C.tolist()
    for place, (row, begin, count) in enumerate(zip(row_C.tolist(), begins, count_C.tolist(), strict=True)):
        if row >= 0 and count > 0:
            k_RHE, v_RHE = (part[row, begin : begin + count].float().numpy() for part in (k_BLHE, v_BLHE))
            found_HKE = _read(q_CKHE[place].float().numpy().transpose(1, 0, 2), k_RHE, v_RHE)
            out[place] = torch.from_numpy(found_HKE.transpose(1, 0, 2))
    return out


def linear(
    x_MK: Tensor,
    weight_NK: Matrix,
    *,
    eps: float | None = None,
    residual_MN: Tensor | None = None,
    residual_scale: float = 1.0,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """What `plain_skinny_linear` computes, in the weights' precision."""
    if run is not None and not bool(run):
        return x_MK.new_zeros(len(x_MK), weight_NK.shape[0])
    if _is_small(x_MK, weight_NK):
        y = _product(x_MK, weight_NK, eps)
        if residual_MN is not None:
            residual = residual_MN.numpy()
            y += residual if residual_scale == 1 else residual * residual_scale
        if out is None:
            return torch.from_numpy(y)
        out.numpy()[:] = y
        return out
    weight_NK = dense(weight_NK, x_MK.dtype)
    x_MK = x_MK if eps is None else F.rms_norm(x_MK, x_MK.shape[1:], None, eps)
    if residual_MN is None:
        y_MN = F.linear(x_MK, weight_NK)
    elif out is residual_MN:
        return residual_MN.addmm_(x_MK, weight_NK.t(), beta=residual_scale)
    else:
        y_MN = torch.addmm(residual_MN, x_MK, weight_NK.t(), beta=residual_scale)
    return y_MN if out is None else out.copy_(y_MN)


def gated(x_MK: Tensor, gate_up_2NK: Matrix, *, eps: float | None = None, run: Tensor | None = None) -> Tensor:
    """What `plain_skinny_gated` computes, in the weights' precision."""
    if run is not None and not bool(run):
        return x_MK.new_zeros(len(x_MK), gate_up_2NK.shape[0] // 2)
    if _is_small(x_MK, gate_up_2NK):
        y_M2N = _product(x_MK, gate_up_2NK, eps)
        gate_MN = y_M2N[:, 0::2]
        y_MN = np.exp(np.minimum(-gate_MN, 88))  # beyond, float32 overflows
        y_MN += 1
        np.divide(gate_MN, y_MN, out=y_MN)
        y_MN *= y_M2N[:, 1::2]
        return torch.from_numpy(y_MN)
    x_MK = x_MK if eps is None else F.rms_norm(x_MK, x_MK.shape[1:], None, eps)
    y_M2N = F.linear(x_MK, dense(gate_up_2NK, x_MK.dtype))
    return F.silu(y_M2N[:, 0::2]).mul_(y_M2N[:, 1::2])


def _is_small(x_MK: Tensor, weight_NK: Matrix) -> bool:
    """Whether NumPy computes a product: a small one takes it half as long, and it waits for no thread."""
    return isinstance(weight_NK, Tensor) and x_MK.shape[0] * weight_NK.numel() <= SMALL and _is_float32(x_MK, weight_NK)


def _product(x_MK: Tensor, weight_NK: Any, eps: float | None) -> np.ndarray:
    """What `linear` computes of a small product, [M, N]."""
    x = x_MK.numpy()
    return (x if eps is None else _normed(x, eps)) @ weight_NK.numpy().T


def _normed(x_MK: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm without weights."""
    if len(x_MK) == 1:
        return x_MK * (np.vdot(x_MK, x_MK) / x_MK.size + eps) ** -0.5
    return x_MK * (np.square(x_MK).mean(1, keepdims=True) + eps) ** -0.5


def _is_float32(*tensors: Tensor) -> bool:
    """What NumPy knows as well."""
    return all(tensor.dtype == torch.float32 for tensor in tensors)
