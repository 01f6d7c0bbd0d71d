"""Causal attention inside documents, with or without a window: the same mask on every backend.

Without a GPU the mask is explicit: dense, or for windows a band of blocks, so that memory is O(T * window). On CUDA it
is where documents begin, for cuDNN, or a FlexAttention block mask; short streams take an explicit one there, too. It is
built once per batch and shared by the layers.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bytelatent.kernels import packed_attention
from bytelatent.kernels.packed_attention import Heads

# Shapes: T positions in the stream, H heads, J key/value heads, E head size, W window, N blocks of W positions

FLEX_FROM = 2048  # positions from which the two others pay on CUDA
FLEX_BLOCK = 128  # positions that FlexAttention decides about at once
WITHOUT_CUDNN = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Mask(Protocol):
    """What positions attend to: a mask, or a KV cache, which is called once per layer, in order."""

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        """Softmax attention of rotated queries and keys, [T, H, E]. Groups of H/J query heads share a key head."""
        ...


@dataclass(frozen=True)
class DenseMask:
    allowed_TT: Tensor

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THE, k_TJE, v_TJE))
        grouped = q_THE.shape[1] != k_TJE.shape[1]
        # With masks cuDNN's backward pass gives NaN where size % 128 is 64 and all scores of a row are far below zero
        # (torch 2.11 and later, Hopper: pytorch/pytorch issue 196678). On a CPU this list excludes its fast form.
        with sdpa_kernel(WITHOUT_CUDNN) if q.is_cuda else nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed_TT, enable_gqa=grouped)
        return out[0].transpose(0, 1)


@dataclass(frozen=True)
class BandedMask:
    allowed_NW2W: Tensor  # each block of W queries sees its own block and the one before
    window: int

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        size, window, grouped = q_THE.shape[0], self.window, q_THE.shape[1] != k_TJE.shape[1]
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -size % window)).unflatten(0, (-1, window)) for x in (q_THE, k_TJE, v_TJE))
        q, k, v = q.transpose(1, 2), _with_previous(k).transpose(1, 2), _with_previous(v).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed_NW2W.unsqueeze(1), enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)[:size]


@dataclass(frozen=True)
class FlexMask:
    block_mask: Any
    attention: Any  # compiled FlexAttention; the eager one would build the whole T x T matrix

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THE, k_TJE, v_TJE))
        grouped = q_THE.shape[1] != k_TJE.shape[1]
        return self.attention(q, k, v, block_mask=self.block_mask, enable_gqa=grouped)[0].transpose(0, 1)


@dataclass(frozen=True)
class PackedMask:
    begin: Tensor  # [B+1] where each document, and padding, begins
    length: Tensor  # [B] int32
    window: int | None

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        return packed_attention.packed_attention(q_THE, k_TJE, v_TJE, self.begin, self.length, self.window)


def build_mask(
    document: Tensor, window: int | None, heads: Heads | None = None, num_documents: int | None = None
) -> Mask:
    """The mask of a packed stream: a position sees itself and what came before it in its document.

    Args:
        document: [T] the document of each position; padding has one of its own (-1).
        window: positions seen, itself included; None for all.
        heads: what attends; None: not known.
        num_documents: at most, beside padding; None: not known. The host cannot see it without waiting.
    """
    size = document.shape[0]
    if document.device.type == "cuda" and size >= FLEX_FROM:
        if heads is None or num_documents is None:
            return _flex_mask(document, window)
        if packed_attention.cudnn_computes(document.device, size, num_documents, heads, window):
            return packed_mask(document, window, num_documents)
        return _flex_mask(document, window)
    index = torch.arange(size, device=document.device)
    if window is None or size <= 2 * window or document.device.type == "cuda":
        return DenseMask(_allowed(document, document, index, index, window))
    padded = -size % window
    blocks = F.pad(document, (0, padded), value=-2).view(-1, window)
    position = torch.arange(size + padded, device=document.device).view(-1, window)
    seen, where = _with_previous(blocks, fill=-3), _with_previous(position, fill=-1)
    return BandedMask(_allowed(blocks, seen, position, where, window), window)


def head_dim_of(rotary_TE2: Tensor) -> int:
    """E, a constant where blocks are compiled; under FSDP a module's attribute is not a constant.

    A second stack's blocks, of another head size, would be compiled for any, and rotate several times slower.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.mark_static(rotary_TE2, 1)
        torch._dynamo.mark_static(rotary_TE2, 2)
    return 2 * rotary_TE2.shape[1]


def _allowed(document: Tensor, seen: Tensor, place: Tensor, where: Tensor, window: int | None) -> Tensor:
    """Which keys (`seen`, `where`) each query (`document`, `place`) may see."""
    distance = place.unsqueeze(-1) - where.unsqueeze(-2)
    allowed = (document.unsqueeze(-1) == seen.unsqueeze(-2)) & (distance >= 0)
    return allowed if window is None else allowed & (distance < window)


def _with_previous(blocks: Tensor, fill: int = 0) -> Tensor:
    """[N, W, ...] -> [N, 2W, ...]: each block after the one before it."""
    before = torch.cat([torch.full_like(blocks[:1], fill), blocks[:-1]])
    return torch.cat([before, blocks], dim=1)


def packed_mask(document: Tensor, window: int | None, num_documents: int) -> PackedMask:
    """The mask for `packed_attention`, for at most this number of documents, and padding at the end."""
    begin, length = packed_attention.entries_of(document, packed_attention.entries_for(num_documents))
    for tensor in (begin, length):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)  # another number of entries is no other program
    return PackedMask(begin, length, window)


def _flex_mask(document: Tensor, window: int | None) -> FlexMask:
    """The mask for FlexAttention, its blocks found without looking at T x T pairs.

    What a position sees is one run, from `low` to itself, and `low` never falls. So a block of queries sees the blocks
    of keys from its first query's `low` to itself, and wholly those from its last query's `low` on.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        within = (document[query] == document[key]) & (query >= key)
        return within if window is None else within & (query - key < window)

    size = document.shape[0]
    place = torch.arange(size, device=document.device)
    is_first = torch.cat([torch.ones_like(document[:1], dtype=torch.bool), document[1:] != document[:-1]])
    low = torch.where(is_first, place, 0).cummax(0).values
    if window is not None:
        low = torch.maximum(low, place - window + 1)
    first = torch.arange(0, size, FLEX_BLOCK, device=document.device)
    block = first // FLEX_BLOCK
    begin = low[first] // FLEX_BLOCK
    inner = torch.minimum(-(-low[(first + FLEX_BLOCK - 1).clamp(max=size - 1)] // FLEX_BLOCK), block)
    number = block[None, :].expand(len(block), -1)
    partial = torch.where(number < (inner - begin)[:, None], begin[:, None] + number, block[:, None])
    whole = (inner[:, None] + number).clamp(max=len(block) - 1)
    block_mask = BlockMask.from_kv_blocks(
        (inner - begin + 1).int()[None, None],
        partial.int()[None, None],
        (block - inner).int()[None, None],
        whole.int()[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=allowed,
        seq_lengths=(size, size),
    )
    return FlexMask(block_mask, _compiled_flex_attention())


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
