"""The Byte Latent Transformer: a local encoder, a global transformer over patches, a local decoder.

    bytes -> local encoder -> patches -> global transformer -> patches -> local decoder -> next bytes

Each part reads a whole batch, or, with a cache, what is new: a prompt or the next bytes.

Without cross-attention (`cross_attention: null`) the same parts make models like two earlier ones: see `megabyte` and
`spacebyte` in `settings`.

Source: Pagnoni et al. 2024, figure 2 and section 3.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bytelatent.kernels.patch_attention import ByteRanges, decoder_cross_attention, encoder_cross_attention
from bytelatent.kernels.patch_pooling import pool_patches
from bytelatent.model.attention import Mask
from bytelatent.model.block import Block, Stack, init_weights
from bytelatent.model.language_model import ByteLM, TokenLM
from bytelatent.model.ngram_hash import NgramHashEmbedding
from bytelatent.model.settings import BLTSettings, CrossAttentionSettings, ModelSettings, TokenLMSettings
from bytelatent.model.stream import PatchedStream, Stream
from bytelatent.vocab import VOCAB_SIZE

# Shapes: T bytes in the batch, P patches, K queries or keys per patch, D local width, G global width, H heads,
# E head size, V vocabulary


class BLTCache(Protocol):
    """The KV cache of a BLT for one pass over T new bytes, among which P patches close."""

    encoder: Mask
    global_transformer: Mask
    decoder: Mask
    tail_TW: Tensor  # the W newest ids up to each one, for its n-grams
    patch_position: Tensor  # [P] number of each closing patch in its document
    own: ByteRanges  # the patches of the bytes that `own_bytes` gives
    read: ByteRanges  # the patch that each new byte reads, of those that `read_patches` gives
    closes: Tensor  # [T] bool, whether a new byte closes its patch

    def pool(self, h_TD: Tensor) -> Tensor:
        """The maximum over each closing patch's bytes, [P, D], from the new ones' states."""
        ...

    def own_bytes(self, layer: int, k_THE: Tensor, v_THE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all bytes of closing patches, earlier ones included, from the new ones'."""
        ...

    def read_patches(self, layer: int, k_PKHE: Tensor, v_PKHE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all patches that new bytes read, earlier ones included, from the closing ones'."""
        ...


class CrossAttention(nn.Module):
    """Cross-attention between bytes and patches: no rotary embedding, a norm of the queries and one of keys and values.

    The result is twice the input plus what attention gives: the published layer adds its input, and its caller adds it
    again. (Sections 3.2.2 and 3.3.1)
    """

    attention: Callable[[Tensor, Tensor, Tensor, ByteRanges], Tensor]

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

    def forward(self, x: Tensor, states: Tensor, ranges: ByteRanges) -> Tensor:
        """What `x` [..., D] becomes, whose queries attend to the keys and values of `states` [..., D]."""
        return self.attend(x, *self.keys_values(states), ranges)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., H, E]; grouped heads are repeated."""
        states = self.key_value_norm(states)
        k, v = (part(states).unflatten(-1, (-1, self.head_dim)) for part in (self.key, self.value))
        if self.group > 1:
            k, v = k.repeat_interleave(self.group, dim=-2), v.repeat_interleave(self.group, dim=-2)
        return k, v

    def attend(self, x: Tensor, k: Tensor, v: Tensor, ranges: ByteRanges) -> Tensor:
        q = self.query(self.query_norm(x)).unflatten(-1, (-1, self.head_dim))
        return 2 * x + self.output(self.attention(q, k, v, ranges).flatten(-2))


class EncoderCrossAttention(CrossAttention):
    """A patch's queries [P, K, D] attend to the states of its bytes [T, D]."""

    attention = staticmethod(encoder_cross_attention)


class DecoderCrossAttention(CrossAttention):
    """A byte's state [T, D] attends to the K key states of the patch it reads [P, K, D]."""

    attention = staticmethod(decoder_cross_attention)


class LocalEncoder(nn.Module):
    """Bytes to byte states, and K query states per patch. (Section 3.2)"""

    def __init__(self, settings: BLTSettings):
        super().__init__()
        encoder, cross = settings.encoder, settings.cross_attention
        self.settings = settings
        # Without values: `init_weights` draws them.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(VOCAB_SIZE, encoder.dim), freeze=False)
        self.ngram_hash = NgramHashEmbedding(settings.ngram_hash, encoder.dim) if settings.ngram_hash else None
        self.stack = Stack(encoder)
        self.cross_attention = nn.ModuleList()
        if cross is not None:
            self.pooled_to_queries = nn.Linear(encoder.dim, cross.k * encoder.dim, bias=False)
            self.cross_attention.extend(
                EncoderCrossAttention(encoder.dim, cross, encoder.norm_eps)
                for _ in range(encoder.num_layers if cross.all_layers_encoder else 1)
            )

    def embed(self, batch: Stream, cache: BLTCache | None = None) -> Tensor:
        """A byte's embedding and the sum of its n-grams', [T, D]."""
        x_TD = self.embedding(batch.ids)
        if self.ngram_hash is None:
            return x_TD
        if cache is not None:
            return x_TD + self.ngram_hash.of_last(cache.tail_TW, batch.position)
        assert isinstance(batch, PatchedStream)
        history = batch.position if self.ngram_hash.settings.stop_at_document else batch.history
        return x_TD + self.ngram_hash(batch.ids, history)

    def byte_states(self, x_TD: Tensor, position: Tensor, mask: Mask) -> list[Tensor]:
        """The byte states [T, D] after each layer that patches attend to; the last ones are the encoder's output."""
        rotary = self.stack.rotary(position)
        states = []
        for block in self.stack.blocks:
            x_TD = block(x_TD, rotary, mask)
            states.append(x_TD)
        return states[-max(len(self.cross_attention), 1) :]

    def queries(self, pooled_PD: Tensor) -> Tensor:
        """The K queries of each patch, [P, K, D], from the maximum of its bytes."""
        queries = self.pooled_to_queries(pooled_PD).to(pooled_PD.dtype)  # under autocast too, states stay in float32
        return queries.unflatten(-1, (self.settings.states_per_patch, -1))

    def patch_states(self, states: list[Tensor], batch: PatchedStream) -> Tensor:
        """The K states of each patch, [P, K, D], from its bytes'."""
        own = ByteRanges.of(batch.patch, batch.num_patches)
        if not self.cross_attention:
            return joined_states(states[-1], own, self.settings.joined_bytes)
        patches_PKD = self.queries(pool_patches(states[0], own))
        for cross, h_TD in zip(self.cross_attention, states, strict=True):
            patches_PKD = cross(patches_PKD, h_TD, own)
        return patches_PKD

    def closing_patch_states(self, states: list[Tensor], cache: BLTCache) -> Tensor:
        """The K states of each patch that closes among new bytes, [P, K, D]; P may be 0."""
        if not self.cross_attention:
            h_T1D = states[-1].unsqueeze(1)
            own_T1D, _ = cache.own_bytes(0, h_T1D, h_T1D[..., :0])
            return joined_states(own_T1D[:, 0], cache.own, self.settings.joined_bytes)
        patches_PKD = self.queries(cache.pool(states[0]))
        layers: Any = self.cross_attention
        for layer, (cross, h_TD) in enumerate(zip(layers, states, strict=True)):
            k, v = cache.own_bytes(layer, *cross.keys_values(h_TD))
            if len(patches_PKD):
                patches_PKD = cross.attend(patches_PKD, k, v, cache.own)
        return patches_PKD

    def forward(self, batch: Stream, cache: BLTCache | None = None) -> tuple[Tensor, Tensor]:
        """Byte states [T, D] and patch states [P, K, D]; with a cache, of the new bytes and the patches they close."""
        x_TD = self.embed(batch, cache)
        if cache is not None:
            states = self.byte_states(x_TD, batch.position, cache.encoder)
            return states[-1], self.closing_patch_states(states, cache)
        assert isinstance(batch, PatchedStream)
        mask = self.stack.mask(batch.document, batch.num_documents)
        states = self.byte_states(x_TD, batch.position, mask)
        return states[-1], self.patch_states(states, batch)


def joined_states(h_TD: Tensor, own: ByteRanges, count: int) -> Tensor:
    """The states of each patch's last `count` bytes, [P, count, D], in order; zeros in front where there are fewer."""
    begin_P1, end_P1 = own.begin[:-1, None], own.begin[1:, None]
    index_PK = end_P1 - torch.arange(count, 0, -1, device=h_TD.device)
    rows_PKD = h_TD.index_select(0, index_PK.clamp(min=0).flatten()).unflatten(0, index_PK.shape)
    return torch.where((index_PK >= begin_P1).unsqueeze(-1), rows_PKD, 0.0)


class GlobalTransformer(nn.Module):
    """Patches to patches; no final norm. (Section 3.1)"""

    def __init__(self, settings: BLTSettings):
        super().__init__()
        dim_in = settings.states_per_patch * settings.encoder.dim
        dim = settings.global_transformer.dim
        self.projection = nn.Linear(dim_in, dim, bias=False) if dim_in != dim else nn.Identity()
        self.stack = Stack(settings.global_transformer)

    def forward(self, patches_PKD: Tensor, position: Tensor, mask: Mask) -> Tensor:
        """[P, K, D] -> [P, G]"""
        if not len(patches_PKD):  # no new byte closes a patch
            return patches_PKD.new_zeros(0, self.stack.settings.dim)
        x_PG = self.projection(patches_PKD.flatten(1)).to(patches_PKD.dtype)
        return self.stack(x_PG, position, mask)


class LocalDecoder(nn.Module):
    """Byte states and patches to the logits of the next bytes. (Section 3.3)"""

    def __init__(self, settings: BLTSettings):
        super().__init__()
        decoder, cross = settings.decoder, settings.cross_attention
        self.settings = settings
        self.cross_attention = nn.ModuleList()
        if cross is None:
            self.patch_norm = nn.RMSNorm(settings.global_transformer.dim, eps=decoder.norm_eps)
            self.patch_to_bytes = nn.Linear(settings.global_transformer.dim, decoder.dim, bias=False)
        else:
            self.patch_to_keys = nn.Linear(settings.global_transformer.dim, cross.k * decoder.dim, bias=False)
            self.cross_attention.extend(
                DecoderCrossAttention(decoder.dim, cross, decoder.norm_eps)
                for _ in range(decoder.num_layers if cross.all_layers_decoder else 1)
            )
        self.stack = Stack(decoder)
        self.norm = nn.RMSNorm(decoder.dim, eps=decoder.norm_eps)
        self.output = nn.Linear(decoder.dim, VOCAB_SIZE, bias=False)

    def keys(self, patches_PG: Tensor) -> Tensor:
        """The K key states of each patch, [P, K, D]."""
        return self.patch_to_keys(patches_PG).unflatten(-1, (self.settings.states_per_patch, -1))

    def with_patches(self, h_TD: Tensor, patches_PG: Tensor, batch: Stream, cache: BLTCache | None) -> Tensor:
        """Byte states with the patches that they read added to them, in place of cross-attention, [T, D]."""
        added_PD = self.patch_to_bytes(self.patch_norm(patches_PG)).to(h_TD.dtype)
        if cache is not None:
            added_P11D = added_PD[:, None, None]
            added_PD = cache.read_patches(0, added_P11D, added_P11D[..., :0])[0][:, 0, 0]
            read_T, closes_T = cache.read.patch_T, cache.closes
        else:
            assert isinstance(batch, PatchedStream)
            read_T, closes_T = batch.read, batch.read == batch.patch
        takes_T = closes_T if self.settings.added_to == "closing" else read_T >= 0
        added_TD = added_PD.index_select(0, read_T.clamp(min=0))
        return h_TD + torch.where(takes_T.unsqueeze(1), added_TD, 0.0)

    def forward(
        self, h_TD: Tensor, patches_PG: Tensor, batch: Stream, cache: BLTCache | None = None, at: Tensor | None = None
    ) -> Tensor:
        """Logits, float32 [T, V]; only of the bytes `at` [N], where given."""
        keys_PKD = None
        if self.cross_attention:
            keys_PKD = self.keys(patches_PG).to(h_TD.dtype)
        else:
            h_TD = self.with_patches(h_TD, patches_PG, batch, cache)
        if cache is not None:
            read, mask = cache.read, cache.decoder
        else:
            assert isinstance(batch, PatchedStream)
            read = ByteRanges.of(batch.read, batch.num_patches)
            mask = self.stack.mask(batch.document, batch.num_documents)
        rotary = self.stack.rotary(batch.position)
        for layer, block in enumerate(self.stack.blocks):
            if layer < len(self.cross_attention):
                cross: Any = self.cross_attention[layer]
                if cache is None:
                    h_TD = cross(h_TD, keys_PKD, read)
                else:
                    h_TD = cross.attend(h_TD, *cache.read_patches(layer, *cross.keys_values(keys_PKD)), read)
            h_TD = block(h_TD, rotary, mask)
        return self.output(self.norm(h_TD if at is None else h_TD[at])).float()


class BLTModel(nn.Module):
    def __init__(self, settings: BLTSettings):
        super().__init__()
        self.settings = settings
        self.encoder = LocalEncoder(settings)
        self.global_transformer = GlobalTransformer(settings)
        self.decoder = LocalDecoder(settings)
        init_weights(self)

    def forward(self, batch: Stream, cache: BLTCache | None = None, at: Tensor | None = None) -> Tensor:
        """Logits of the id that follows each id, float32 [T, V].

        Args:
            batch: a `PatchedStream`; with a cache, new bytes, which the cache has cut into patches.
            at: [N] the bytes whose logits are wanted; None for all.
        """
        h_TD, patches_PKD = self.encoder(batch, cache)
        if cache is not None:
            position, mask = cache.patch_position, cache.global_transformer
        else:
            assert isinstance(batch, PatchedStream)
            position = batch.patch_position
            mask = self.global_transformer.stack.mask(batch.patch_document, batch.num_documents)
        patches_PG = self.global_transformer(patches_PKD, position, mask)
        return self.decoder(h_TD, patches_PG, batch, cache, at)


def build_model(settings: ModelSettings) -> nn.Module:
    """The model these settings describe, with fresh weights, on torch's default device."""
    if isinstance(settings, BLTSettings):
        return BLTModel(settings)
    return (TokenLM if isinstance(settings, TokenLMSettings) else ByteLM)(settings)


def compile_regions(model: nn.Module) -> None:
    """Compile a model block by block: alike blocks share one graph, and masks are built outside of it."""
    for part in model.modules():
        if isinstance(part, Block | CrossAttention):
            # Not `part.compile()`, which ignores a forward that was replaced.
            part.forward = torch.compile(part.forward)  # pyright: ignore[reportAttributeAccessIssue]
