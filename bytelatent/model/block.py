"""Transformer blocks: pre-norm, rotary attention without bias, SwiGLU."""

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
        kv_dim = settings.kv_heads * settings.head_dim
        self.query = nn.Linear(settings.dim, settings.dim, bias=False)
        self.key = nn.Linear(settings.dim, kv_dim, bias=False)
        self.value = nn.Linear(settings.dim, kv_dim, bias=False)
        self.output = nn.Linear(settings.dim, settings.dim, bias=False)

    def forward(self, x_TD: Tensor, rotary_TE2: Tensor, mask: Mask) -> Tensor:
        head_dim = head_dim_of(rotary_TE2)
        q_THE = self.query(x_TD).unflatten(-1, (-1, head_dim))
        k_TJE = self.key(x_TD).unflatten(-1, (-1, head_dim))
        v_TJE = self.value(x_TD).unflatten(-1, (-1, head_dim))
        out_THE = mask.attend(rotate(q_THE, rotary_TE2), rotate(k_TJE, rotary_TE2), v_TJE)
        return self.output(out_THE.flatten(-2))


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
        return rotary_embedding(position, self.settings.head_dim, self.settings.rope_theta)

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

    For a feed-forward's output the input width is its hidden width.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding | nn.EmbeddingBag):
            std = part.weight.shape[1] ** -0.5
            nn.init.trunc_normal_(part.weight, std=std, a=-3 * std, b=3 * std, generator=generator)
        elif isinstance(part, nn.RMSNorm):
            nn.init.ones_(part.weight)
