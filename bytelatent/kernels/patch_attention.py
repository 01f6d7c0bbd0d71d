"""Attention between bytes and patches, and their pooling. It is no masked attention: linear in T, no T x P matrix.

Encoder: a patch's queries see only its own bytes, so the softmax runs over segments of the stream.
Decoder: a byte sees only the K keys of the patch it reads, so its keys are gathered.

The bytes in a patch lie side by side, and so do those that read one. So on CUDA a kernel walks over these runs: nothing
is copied to every byte, nothing is added atomically, and sums are always in the same order.

Source: Pagnoni et al. 2024, sections 3.2.2 and 3.3.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bytelatent.kernels import patch_attention_ops as ops

# Shapes: T bytes in the batch, P patches, K queries or keys a patch, D local width, H heads, E head size


@dataclass(frozen=True)
class PatchRuns:
    """Which bytes belong to which patch: those in it, or those that read it. Built once a batch, for all layers."""

    patch_T: Tensor  # the patch of each byte, never falling; -1: none
    begin: Tensor  # [P+1] int32, where each patch's run of bytes begins, and T; bytes of none lie anywhere in a run

    @property
    def num_patches(self) -> int:
        return self.begin.shape[0] - 1


def runs_of(patch_T: Tensor, num_patches: int) -> PatchRuns:
    """The runs of bytes in a patch (a stream's `patch`), or of those that read one (its `read`)."""
    order_T = patch_T.clamp(min=0).cummax(0).values
    patches = torch.arange(num_patches + 1, device=patch_T.device)
    return PatchRuns(patch_T, torch.searchsorted(order_T, patches, out_int32=True))


def pool_patches(h_TD: Tensor, runs: PatchRuns) -> Tensor:
    """Elementwise maximum of each patch's bytes, [P, D]; zero for a patch without bytes.

    Bytes that are equally high share the gradient.
    """
    return ops.pool(h_TD, runs.begin) if _takes_kernels(h_TD) else plain_pool_patches(h_TD, runs)


def plain_pool_patches(h_TD: Tensor, runs: PatchRuns) -> Tensor:
    index_TD = runs.patch_T.unsqueeze(1).expand_as(h_TD)
    lowest_PD = h_TD.new_full([runs.num_patches, h_TD.shape[1]], -torch.inf)  # a zero would share in gradients of zeros
    highest_PD = lowest_PD.scatter_reduce(0, index_TD, h_TD, "amax")
    return torch.where((runs.begin.diff() > 0)[:, None], highest_PD, 0.0)


def attend_to_own_bytes(q_PKHE: Tensor, k_THE: Tensor, v_THE: Tensor, runs: PatchRuns) -> Tensor:
    """Each patch's queries attend to the patch's bytes.

    Args:
        q_PKHE: queries.
        k_THE, v_THE: keys and values of the bytes.
        runs: the bytes in each patch; every byte is in one.

    Returns:
        [P, K, H, E] in the queries' dtype, computed in float32; zero for a patch without bytes.
    """
    if _takes_kernels(q_PKHE):
        return ops.own_bytes(q_PKHE, k_THE, v_THE, runs.begin)[0]
    return plain_attend_to_own_bytes(q_PKHE, k_THE, v_THE, runs)


def plain_attend_to_own_bytes(q_PKHE: Tensor, k_THE: Tensor, v_THE: Tensor, runs: PatchRuns) -> Tensor:
    num_patches, num_queries, num_heads, head_dim = q_PKHE.shape
    patch = runs.patch_T
    q, k, v = (_wide(x) for x in (q_PKHE, k_THE, v_THE))
    score_TKH = (q.index_select(0, patch) * k.unsqueeze(1)).sum(-1) * head_dim**-0.5
    lowest = score_TKH.new_full([num_patches, num_queries, num_heads], -torch.inf)
    index_TKH = patch[:, None, None].expand_as(score_TKH)
    highest = lowest.scatter_reduce(0, index_TKH, score_TKH.detach(), "amax")  # only steadies the exponential
    weight_TKH = (score_TKH - highest.index_select(0, patch)).exp()
    total_PKH = torch.zeros_like(lowest).index_add(0, patch, weight_TKH)
    weighted = weight_TKH.unsqueeze(-1) * v.unsqueeze(1)
    sum_PKHE = weighted.new_zeros(q_PKHE.shape).index_add(0, patch, weighted)
    out = sum_PKHE / total_PKH.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return out.to(q_PKHE.dtype)


def attend_to_read_patch(q_THE: Tensor, k_PKHE: Tensor, v_PKHE: Tensor, runs: PatchRuns) -> Tensor:
    """Each byte attends to the K keys of the patch it reads.

    Args:
        q_THE: queries of the bytes.
        k_PKHE, v_PKHE: keys and values of the patches.
        runs: the bytes that read each patch.

    Returns:
        [T, H, E] in the queries' dtype, computed in float32; zero for a byte that reads no patch.
    """
    if _takes_kernels(q_THE):
        return ops.read_patch(q_THE, k_PKHE, v_PKHE, runs.patch_T, runs.begin)
    return plain_attend_to_read_patch(q_THE, k_PKHE, v_PKHE, runs)


def plain_attend_to_read_patch(q_THE: Tensor, k_PKHE: Tensor, v_PKHE: Tensor, runs: PatchRuns) -> Tensor:
    read = runs.patch_T
    place = read.clamp(min=0)
    k_TKHE, v_TKHE = (_wide(x).index_select(0, place) for x in (k_PKHE, v_PKHE))
    score_TKH = (_wide(q_THE).unsqueeze(1) * k_TKHE).sum(-1) * q_THE.shape[-1] ** -0.5
    out_THE = (score_TKH.softmax(dim=1).unsqueeze(-1) * v_TKHE).sum(dim=1)
    return torch.where((read >= 0)[:, None, None], out_THE, 0.0).to(q_THE.dtype)


def _takes_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def _wide(x: Tensor) -> Tensor:
    """What to compute in: float32, or float64 where the input is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
