"""Operations of a decoding step once more, slow and obvious, in float64: what their plain forms must equal."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.kernels.quantized import Matrix, QuantizedMatrix
from tests.model.slow import ngram_hash


def rotate(x_HE: Tensor, rotary_A2: Tensor) -> Tensor:
    """Each pair by its angle's cosine and sine, one number after another."""
    out = x_HE.clone()
    for pair, (cos, sin) in enumerate(rotary_A2.tolist()):
        even, odd = x_HE[:, 2 * pair], x_HE[:, 2 * pair + 1]
        out[:, 2 * pair], out[:, 2 * pair + 1] = even * cos - odd * sin, even * sin + odd * cos
    return out


def attend(q_HE: Tensor, k_NJE: Tensor, v_NJE: Tensor) -> Tensor:
    """Softmax attention of H heads at one position to N keys, [H, E]."""
    group = q_HE.shape[0] // k_NJE.shape[1]
    k, v = (part.double().repeat_interleave(group, dim=1) for part in (k_NJE, v_NJE))
    weight = (torch.einsum("he,nhe->hn", q_HE.double(), k) * q_HE.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hn,nhe->he", weight, v)


def decode_attention(
    qkv: Tensor,
    cache_k_CRJE: Tensor,
    cache_v_CRJE: Tensor,
    position_B: Tensor,
    rotary_PA2: Tensor,
    *,
    heads: int,
    window: int | None,
    row_B: Tensor,
) -> Tensor:
    """NaN where a sequence is skipped."""
    _, slots, kv_heads, head_dim = cache_k_CRJE.shape
    out = torch.full((len(qkv), heads * head_dim), torch.nan, dtype=torch.float64)
    for b, (position, row) in enumerate(zip(position_B.tolist(), row_B.tolist(), strict=True)):
        if row < 0:
            continue
        q_HE, k_JE, v_JE = qkv[b].view(-1, head_dim).split([heads, kv_heads, kv_heads])
        q_HE, k_JE = (rotate(x.double(), rotary_PA2[position]).to(qkv.dtype) for x in (q_HE, k_JE))
        cache_k_CRJE[row, position % slots], cache_v_CRJE[row, position % slots] = k_JE, v_JE
        low = 0 if window is None else max(position - window + 1, 0)
        seen = torch.arange(low, position + 1) % slots
        out[b] = attend(q_HE, cache_k_CRJE[row, seen], cache_v_CRJE[row, seen]).flatten()
    return out


def linear(
    x_MK: Tensor,
    weight_NK: Matrix,
    eps: float | None = None,
    residual_MN: Tensor | None = None,
    residual_scale: float = 1.0,
) -> Tensor:
    x = x_MK.double()
    if eps is not None:
        x = F.rms_norm(x, x.shape[1:], None, eps)
    y_MN = x @ exact(weight_NK).T
    return y_MN if residual_MN is None else y_MN + residual_scale * residual_MN.double()


def gated(x_MK: Tensor, gate_up_2NK: Matrix, eps: float | None = None) -> Tensor:
    both_M2N = linear(x_MK, gate_up_2NK, eps)
    return F.silu(both_M2N[:, 0::2]) * both_M2N[:, 1::2]


def exact(matrix: Matrix) -> Tensor:
    """The numbers of a matrix, float64."""
    if isinstance(matrix, QuantizedMatrix):
        return matrix.values.double() * matrix.scale.double()[:, None]
    return matrix.double()


def hash_embed(
    tail_BL: Tensor,
    history_T: Tensor,
    sizes: list[int],
    functions: int,
    tables_NVD: Tensor,
    embedding_D: Tensor,
    new: int,
) -> Tensor:
    """The newest `new` ids of each sequence, each with the n-grams that end at it."""
    rows = len(tables_NVD) // (functions * len(sizes))
    out = []
    for number, reach in enumerate(history_T.tolist()):
        sequence = tail_BL[number // new].tolist()
        at = len(sequence) - new + number % new
        text = [value if at - place <= reach else 0 for place, value in enumerate(sequence)]
        hashes = [ngram_hash(text, at, size, function, rows) for function in range(functions) for size in sizes]
        found = tables_NVD[[table * rows + value for table, value in enumerate(hashes)]].double().sum(0)
        out.append(found + embedding_D[sequence[at]].double())
    return torch.stack(out)
