"""What the plain forms of several operations share on a CPU.

With a few rows each operation costs a CPU more than what it computes. So the plain forms of a decoding step use few
operations, and NumPy's where these are small, over the same memory: they cost a third of PyTorch's. PyTorch also shares
the smallest softmax and product of several rows among its threads; with another program on the machine each wait for
them can take milliseconds.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Shapes: R keys, J key/value heads, G queries that share one, E head size, M rows, K width


class Arrays:
    """The tensors of a dataclass as arrays over the same memory, to read and to write."""

    def __init__(self, tensors: Any):
        self._tensors = tensors

    def __getattr__(self, name: str) -> np.ndarray:
        return _array(getattr(self._tensors, name))


@lru_cache(maxsize=1024)  # a view takes as long as the operation that it saves
def _array(tensor: Tensor) -> np.ndarray:
    return tensor.numpy()


def is_float32(*tensors: Tensor) -> bool:
    """Whether NumPy can compute with all of them."""
    return all(tensor.dtype == torch.float32 for tensor in tensors)


def attend_array(
    q_JGE: np.ndarray, k_RJE: np.ndarray, v_RJE: np.ndarray, bias_R: np.ndarray | None = None
) -> np.ndarray:
    """Softmax attention of G queries of each of J heads to R keys, [J, G, E]; `bias_R` is added to the scores."""
    scores_JGR = (q_JGE * q_JGE.shape[-1] ** -0.5) @ k_RJE.transpose(1, 2, 0)
    if bias_R is not None:
        scores_JGR += bias_R
    scores_JGR -= scores_JGR.max(-1, keepdims=True)
    weight_JGR = np.exp(scores_JGR, out=scores_JGR)
    weight_JGR /= weight_JGR.sum(-1, keepdims=True)
    return weight_JGR @ v_RJE.transpose(1, 0, 2)


def rms_norm_array(x_MK: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm without weights."""
    if len(x_MK) == 1:
        return x_MK * (np.vdot(x_MK, x_MK) / x_MK.size + eps) ** -0.5
    return x_MK * (np.square(x_MK).mean(1, keepdims=True) + eps) ** -0.5
