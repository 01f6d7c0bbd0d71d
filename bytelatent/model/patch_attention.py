"""Attention between bytes and patches. It is no masked attention: linear in T, no T x P matrix anywhere.

Encoder: a patch's queries see only its own bytes, so the softmax runs over segments of the stream.
Decoder: a byte sees only the K keys of the patch it reads, so its keys are gathered.

Source: Pagnoni et al. 2024, sections 3.2.2 and 3.3.1.
"""

import torch
from torch import Tensor, nn

from bytelatent.model.settings import CrossAttentionSettings

# Shapes: T bytes in the batch, P patches, K queries or keys a patch, D local width, H heads, E head size


def pool_patches(h_TD: Tensor, patch: Tensor, num_patches: int) -> Tensor:
    """Elementwise maximum of each patch's bytes, [P, D]; zero for a patch without bytes."""
    zeros = h_TD.new_zeros(num_patches, h_TD.shape[1])
    index_TD = patch.unsqueeze(1).expand_as(h_TD)
    return zeros.scatter_reduce(0, index_TD, h_TD, "amax", include_self=False)


def attend_to_own_bytes(q_PKHE: Tensor, k_THE: Tensor, v_THE: Tensor, patch: Tensor) -> Tensor:
    """Each patch's queries attend to the patch's bytes.

    Args:
        q_PKHE: queries.
        k_THE, v_THE: keys and values of the bytes.
        patch: [T] the patch of each byte.

    Returns:
        [P, K, H, E] in float32; zero for a patch without bytes.
    """
    num_patches, num_queries, num_heads, head_dim = q_PKHE.shape
    q_TKHE = q_PKHE.index_select(0, patch)
    score_TKH = (q_TKHE * k_THE.unsqueeze(1)).sum(-1).float() * head_dim**-0.5
    lowest = score_TKH.new_full([num_patches, num_queries, num_heads], -torch.inf)
    index_TKH = patch[:, None, None].expand_as(score_TKH)
    highest = lowest.scatter_reduce(0, index_TKH, score_TKH.detach(), "amax")  # only steadies the exponential
    weight_TKH = (score_TKH - highest.index_select(0, patch)).exp()
    total_PKH = torch.zeros_like(lowest).index_add(0, patch, weight_TKH)
    weighted = weight_TKH.unsqueeze(-1) * v_THE.float().unsqueeze(1)
    sum_PKHE = weighted.new_zeros(q_PKHE.shape).index_add(0, patch, weighted)
    return sum_PKHE / total_PKH.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)


def attend_to_read_patch(q_THE: Tensor, k_PKHE: Tensor, v_PKHE: Tensor, read: Tensor) -> Tensor:
    """Each byte attends to the K keys of the patch it reads.

    Args:
        q_THE: queries of the bytes.
        k_PKHE, v_PKHE: keys and values of the patches.
        read: [T] the patch each byte reads; -1: none.

    Returns:
        [T, H, E] in float32; zero for a byte that reads no patch.
    """
    place = read.clamp(min=0)
    k_TKHE, v_TKHE = k_PKHE.index_select(0, place), v_PKHE.index_select(0, place)
    score_TKH = (q_THE.unsqueeze(1) * k_TKHE).sum(-1).float() * q_THE.shape[-1] ** -0.5
    out_THE = (score_TKH.softmax(dim=1).unsqueeze(-1) * v_TKHE.float()).sum(dim=1)
    return torch.where((read >= 0)[:, None, None], out_THE, 0.0)


class CrossAttention(nn.Module):
    """The projections around either attention; no rotary embedding, norms of queries and of keys and values apart.

    The result is twice the input plus what attention found: the published layer adds its input, and its caller adds
    it again.
    """

    def __init__(self, dim: int, settings: CrossAttentionSettings, norm_eps: float):
        super().__init__()
        self.head_dim = dim // settings.num_heads
        self.group = settings.num_heads // settings.kv_heads  # query heads that share a key and value head
        kv_dim = settings.kv_heads * self.head_dim
        self.query_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.key_value_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, kv_dim, bias=False)
        self.value = nn.Linear(dim, kv_dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def queries(self, x: Tensor) -> Tensor:
        """[..., H, E] of the states `x` [..., D] that look."""
        return self.query(self.query_norm(x)).unflatten(-1, (-1, self.head_dim))

    def keys_values(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """[..., H, E] each, of the states `seen` [..., D] that are looked at; grouped heads are repeated."""
        seen = self.key_value_norm(seen)
        k, v = (part(seen).unflatten(-1, (-1, self.head_dim)) for part in (self.key, self.value))
        if self.group > 1:
            k, v = k.repeat_interleave(self.group, dim=-2), v.repeat_interleave(self.group, dim=-2)
        return k, v

    def add(self, x: Tensor, found: Tensor) -> Tensor:
        """`found` [..., H, E] put back together and added to `x`."""
        return 2 * x + self.output(found.flatten(-2).to(x.dtype))


class GatherBytes(CrossAttention):
    """Encoder: a patch's queries look at its bytes."""

    def forward(self, queries_PKD: Tensor, h_TD: Tensor, patch: Tensor) -> Tensor:
        """[P, K, D] -> [P, K, D]"""
        found = attend_to_own_bytes(self.queries(queries_PKD), *self.keys_values(h_TD), patch)
        return self.add(queries_PKD, found)


class ReadPatches(CrossAttention):
    """Decoder: a byte looks at the patch it reads."""

    def forward(self, h_TD: Tensor, keys_PKD: Tensor, read: Tensor) -> Tensor:
        """[T, D] -> [T, D]"""
        return self.read(h_TD, *self.keys_values(keys_PKD), read)

    def read(self, h_TD: Tensor, k_PKHE: Tensor, v_PKHE: Tensor, read: Tensor) -> Tensor:
        """The same, with keys and values that are known already."""
        return self.add(h_TD, attend_to_read_patch(self.queries(h_TD), k_PKHE, v_PKHE, read))
