"""Transformer blocks: pre-norm, rotary attention, SwiGLU. Biases and norms of queries and keys are options."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bytelatent.kernels.packed_attention import Heads
from bytelatent.kernels.rotary import rotary_embedding, rotate
from bytelatent.model.attention import Mask, build_mask, head_dim_of
from bytelatent.model.settings import StackSettings

# Shapes: T positions in the stream, D width, H heads, J key/value heads, E head size, F feed-forward width


class Attention(nn.Module):
    def __init__(self, settings: StackSettings):
        super().__init__()
        kv_dim, bias = settings.kv_heads * settings.head_dim, settings.attention_bias
        self.query = nn.Linear(settings.dim, settings.attention_dim, bias=bias)
        self.key = nn.Linear(settings.dim, kv_dim, bias=bias)
        self.value = nn.Linear(settings.dim, kv_dim, bias=bias)
        self.output = nn.Linear(settings.attention_dim, settings.dim, bias=False)
        self.has_qk_norm = settings.qk_norm
        if settings.qk_norm:
            self.query_norm = nn.RMSNorm(settings.head_dim, eps=settings.norm_eps)
            self.key_norm = nn.RMSNorm(settings.head_dim, eps=settings.norm_eps)

    def queries_keys(self, x_TD: Tensor, rotary_TE2: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries [T, H, E] and keys [T, J, E]."""
        head_dim = head_dim_of(rotary_TE2)
        q_THE = self.query(x_TD).unflatten(-1, (-1, head_dim))
        k_TJE = self.key(x_TD).unflatten(-1, (-1, head_dim))
        if self.has_qk_norm:
            q_THE, k_TJE = _normed(q_THE, self.query_norm), _normed(k_TJE, self.key_norm)
        return rotate(q_THE, rotary_TE2), rotate(k_TJE, rotary_TE2)

    def forward(self, x_TD: Tensor, rotary_TE2: Tensor, mask: Mask) -> Tensor:
        q_THE, k_TJE = self.queries_keys(x_TD, rotary_TE2)
        v_TJE = self.value(x_TD).unflatten(-1, (-1, q_THE.shape[-1]))
        return self.output(mask.attend(q_THE, k_TJE, v_TJE).flatten(-2))


def _normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Normalized in the precision of the norm's weights: under autocast `x` has another."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, settings: StackSettings):
        super().__init__()
        self.gate = nn.Linear(settings.dim, settings.hidden_dim, bias=False)
        self.up = nn.Linear(settings.dim, settings.hidden_dim, bias=False)
        self.down = nn.Linear(settings.hidden_dim, settings.dim, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_TD)) * self.up(x_TD))


class Block(nn.Module):
    def __init__(self, settings: StackSettings):
        super().__init__()
        self.attention_norm = nn.RMSNorm(settings.dim, eps=settings.norm_eps)
        self.attention = Attention(settings)
        self.feed_forward_norm = nn.RMSNorm(settings.dim, eps=settings.norm_eps)
        self.feed_forward = FeedForward(settings)

    def forward(self, x_TD: Tensor, rotary_TE2: Tensor, mask: Mask) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rotary_TE2, mask)
        return x_TD + self.feed_forward(self.feed_forward_norm(x_TD))


class Stack(nn.Module):
    """Blocks one after another. The local encoder and decoder interleave them with cross-attention."""

    def __init__(self, settings: StackSettings):
        super().__init__()
        self.settings = settings
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.num_layers))

    def rotary(self, position: Tensor) -> Tensor:
        settings = self.settings
        return rotary_embedding(position, settings.head_dim, settings.rope_theta, settings.rope_scaling)

    def mask(self, document: Tensor, num_documents: int | None) -> Mask:
        """What the positions of a packed stream see; see `build_mask`."""
        settings, on = self.settings, document.device.type
        mixed = torch.amp.is_autocast_available(on) and torch.is_autocast_enabled(on)
        dtype = torch.get_autocast_dtype(on) if mixed else next(self.blocks.parameters()).dtype
        heads = Heads(dtype, settings.num_heads, settings.kv_heads, settings.head_dim)
        return build_mask(document, settings.window, heads, num_documents)

    def forward(self, x_TD: Tensor, position: Tensor, mask: Mask) -> Tensor:
        rotary_TE2 = self.rotary(position)
        for block in self.blocks:
            x_TD = block(x_TD, rotary_TE2, mask)
        return x_TD


@torch.no_grad()
def init_weights(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Initialise every weight below `module`.

    | weight               | distribution                                        |
    | -------------------- | --------------------------------------------------- |
    | embedding, hash table| normal, std dim^-1/2, cut at 3 std                  |
    | linear               | normal, std (input width)^-1/2, cut at 3 std        |
    | norm                 | ones                                                |
    | bias                 | zeros                                               |

    For a feed-forward's output the input width is its hidden width.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding | nn.EmbeddingBag):
            std = part.weight.shape[1] ** -0.5
            nn.init.trunc_normal_(part.weight, std=std, a=-3 * std, b=3 * std, generator=generator)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.RMSNorm):
            nn.init.ones_(part.weight)
