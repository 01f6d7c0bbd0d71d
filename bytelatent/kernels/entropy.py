"""The entropy of a few rows of logits, in one kernel."""

from typing import Any

import torch
from torch import Tensor

from bytelatent.kernels.overlap import launch_options

# Shapes: M rows, V vocabulary


def plain_entropy(logits_MV: Tensor, *, out: Tensor | None = None, run: Tensor | None = None) -> Tensor:
    """What `entropy` computes."""
    log_probabilities = logits_MV.float().log_softmax(dim=-1)
    entropy_M = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    out = torch.zeros_like(entropy_M) if out is None else out
    if run is None or bool(run):
        out.copy_(entropy_M)
    return out


def entropy(logits_MV: Tensor, *, out: Tensor | None = None, run: Tensor | None = None) -> Tensor:
    """Entropy in nats of the distributions that logits give, float32 [M].

    Args:
        logits_MV: finite; rows may lie apart.
        out: where the result goes.
        run: one number on the device; where it is 0 nothing is written.
    """
    from bytelatent.kernels import entropy_triton

    kernels: Any = entropy_triton
    rows, vocab_size = logits_MV.shape
    assert logits_MV.stride(1) == 1, "a row is not contiguous"
    out = torch.empty(rows, dtype=torch.float32, device=logits_MV.device) if out is None else out
    kernels.entropy_kernel[(rows,)](
        logits_MV,
        out,
        run,
        logits_MV.stride(0),
        V=vocab_size,
        PADDED=1 << (vocab_size - 1).bit_length(),
        num_warps=2,
        **launch_options(),
    )
    return out
