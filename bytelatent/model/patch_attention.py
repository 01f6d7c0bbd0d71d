"""Cross-attention between bytes and patches: the layers around what `bytelatent.kernels.patch_attention` computes.

Source: Pagnoni et al. 2024, sections 3.2.2 and 3.3.1.
"""

from torch import Tensor, nn

from bytelatent.kernels.patch_attention import ByteRanges, decoder_cross_attention, encoder_cross_attention
from bytelatent.model.settings import CrossAttentionSettings

# Shapes: T bytes in the batch, P patches, K queries or keys a patch, D local width, H heads, E head size


class CrossAttention(nn.Module):
    """The projections around either attention; no rotary embedding, norms of queries and of keys and values apart.

    The result is twice the input plus what attention gives: the published layer adds its input, and its caller adds it
    again.
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
        """Queries [..., H, E] of states `x` [..., D]."""
        return self.query(self.query_norm(x)).unflatten(-1, (-1, self.head_dim))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., H, E] of states `x` [..., D]; grouped heads are repeated."""
        x = self.key_value_norm(x)
        k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.key, self.value))
        if self.group > 1:
            k, v = k.repeat_interleave(self.group, dim=-2), v.repeat_interleave(self.group, dim=-2)
        return k, v

    def add(self, x: Tensor, found: Tensor) -> Tensor:
        """`found` [..., H, E] put back together and added to `x`."""
        return 2 * x + self.output(found.flatten(-2))


class EncoderCrossAttention(CrossAttention):
    """A patch's queries attend to its bytes."""

    def forward(self, queries_PKD: Tensor, h_TD: Tensor, own: ByteRanges) -> Tensor:
        """[P, K, D] -> [P, K, D]"""
        return self.attend(queries_PKD, *self.keys_values(h_TD), own)

    def attend(self, queries_PKD: Tensor, k_THE: Tensor, v_THE: Tensor, own: ByteRanges) -> Tensor:
        """The same with keys and values of the bytes."""
        return self.add(queries_PKD, encoder_cross_attention(self.queries(queries_PKD), k_THE, v_THE, own))


class DecoderCrossAttention(CrossAttention):
    """A byte attends to the K keys of the patch it reads."""

    def forward(self, h_TD: Tensor, keys_PKD: Tensor, read: ByteRanges) -> Tensor:
        """[T, D] -> [T, D]"""
        return self.read(h_TD, *self.keys_values(keys_PKD), read)

    def read(self, h_TD: Tensor, k_PKHE: Tensor, v_PKHE: Tensor, read: ByteRanges) -> Tensor:
        """The same with keys and values of the patches."""
        return self.add(h_TD, decoder_cross_attention(self.queries(h_TD), k_PKHE, v_PKHE, read))
