"""The byte LM's entropies as fast as a GPU gives them: joined products, in-place sums and kernels, no gradients.

The model is `ByteLM`; this is another order of the same arithmetic.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.kernels.gated_product import ROWS, can_gate, fast_row_scale, gated_product, interleaved
from bytelatent.kernels.rotary import cos_sin
from bytelatent.kernels.window_attention import can_attend, first_seen, window_attention
from bytelatent.model import ByteLM, ByteLMSettings, Stream, entropies

# Shapes: T ids in the stream, D width, H heads, E head size

SLICE = 16_384  # ids whose logits are held at once


class FastEntropies:
    """Entropies of packed streams.

    Args:
        byte_lm: on the device that computes.
        dtype: of the weights and states; sums, norms and softmaxes are float32.
    """

    def __init__(self, byte_lm: ByteLM, dtype: torch.dtype = torch.bfloat16):
        self.settings = byte_lm.settings
        self.embedding = byte_lm.embedding.weight.detach().to(dtype)
        self.norm = byte_lm.norm.weight.detach().to(dtype)
        self.output = byte_lm.output.weight.detach().to(dtype)
        blocks: Any = byte_lm.stack.blocks
        self.layers = [
            {
                "attention_norm": block.attention_norm.weight.detach().to(dtype),
                "qkv": torch.cat([part.weight.detach() for part in _projections(block.attention)]).to(dtype),
                "output": block.attention.output.weight.detach().to(dtype),
                "gate_up": interleaved(
                    block.feed_forward.gate.weight.detach() * block.feed_forward_norm.weight.detach(),
                    block.feed_forward.up.weight.detach() * block.feed_forward_norm.weight.detach(),
                ).to(dtype),
                "down": block.feed_forward.down.weight.detach().to(dtype),
            }
            for block in blocks
        ]

    @classmethod
    def where_possible(cls, byte_lm: ByteLM | None, device: torch.device, dtype: torch.dtype) -> "FastEntropies | None":
        """Of a byte LM on this device; None where the kernels cannot compute it, or not as precisely as is asked."""
        if byte_lm is None or device.type != "cuda" or dtype != torch.bfloat16:
            return None
        return cls(byte_lm) if cls.supports(byte_lm.settings) else None

    @staticmethod
    def supports(settings: ByteLMSettings) -> bool:
        """Whether the kernels can do a byte LM of this shape."""
        heads = (settings.num_heads, settings.kv_heads, settings.head_dim)
        return can_attend(*heads) and can_gate(2 * settings.hidden_dim, settings.dim)

    @torch.no_grad()
    def __call__(self, stream: Stream) -> Tensor:
        """Uncertainty about the id that follows each id, in nats, float32 [T]."""
        settings = self.settings
        eps, dim = settings.norm_eps, settings.dim
        size = len(stream.ids)
        padding = torch.arange(-size % ROWS, device=stream.ids.device)  # kernels take rows so many at a time
        ids, position = torch.cat([stream.ids, padding * 0]), torch.cat([stream.position, padding])
        low = first_seen(position, settings.window)
        cos, sin = cos_sin(position, settings.head_dim, settings.rope_theta)
        x_TD = F.embedding(ids, self.embedding)
        for layer in self.layers:
            qkv = F.linear(F.rms_norm(x_TD, (dim,), layer["attention_norm"], eps), layer["qkv"])
            q, k, v = qkv.unflatten(-1, (3, settings.num_heads, settings.head_dim)).unbind(1)
            x_TD.addmm_(window_attention(q, k, v, low, cos, sin).flatten(1), layer["output"].T)
            x_TD.addmm_(gated_product(x_TD, fast_row_scale(x_TD, eps), layer["gate_up"]), layer["down"].T)
        parts = x_TD.split(SLICE)  # float32 logits of all ids at once would take more than the model
        found = [entropies(F.linear(F.rms_norm(x, (dim,), self.norm, eps), self.output)) for x in parts]
        return torch.cat(found)[:size]


def _projections(attention: Any) -> tuple[torch.nn.Linear, ...]:
    return attention.query, attention.key, attention.value
