"""The Byte Latent Transformer: a local encoder, a global transformer over patches, a local decoder.

    bytes -> local encoder -> patches -> global transformer -> patches -> local decoder -> next bytes

Source: Pagnoni et al. 2024, figure 2 and section 3.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bytelatent.kernels.patch_attention import ByteRanges
from bytelatent.kernels.patch_pooling import pool_patches
from bytelatent.model.attention import Mask
from bytelatent.model.block import Stack, init_weights
from bytelatent.model.ngram_hash import NgramHashEmbedding
from bytelatent.model.patch_attention import DecoderCrossAttention, EncoderCrossAttention
from bytelatent.model.settings import BLTSettings
from bytelatent.model.stream import PatchedStream
from bytelatent.vocab import VOCAB_SIZE

# Shapes: T bytes in the batch, P patches, K queries or keys a patch, D local width, G global width, V vocabulary


class LocalEncoder(nn.Module):
    """Bytes to byte states, and K query states a patch. (Section 3.2)"""

    def __init__(self, settings: BLTSettings):
        super().__init__()
        encoder, cross = settings.encoder, settings.cross_attention
        self.settings = settings
        # Without values: `init_weights` draws them.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(VOCAB_SIZE, encoder.dim), freeze=False)
        self.ngram_hash = NgramHashEmbedding(settings.ngram_hash, encoder.dim) if settings.ngram_hash else None
        self.stack = Stack(encoder)
        self.pooled_to_queries = nn.Linear(encoder.dim, cross.k * encoder.dim, bias=False)
        self.cross_attention = nn.ModuleList(
            EncoderCrossAttention(encoder.dim, cross, encoder.norm_eps)
            for _ in range(encoder.num_layers if cross.all_layers_encoder else 1)
        )

    def embed(self, batch: PatchedStream) -> Tensor:
        """A byte's embedding and the sum of its n-grams', [T, D]."""
        x_TD = self.embedding(batch.ids)
        if self.ngram_hash is None:
            return x_TD
        history = batch.position if self.ngram_hash.settings.stop_at_document else batch.history
        return x_TD + self.ngram_hash(batch.ids, history)

    def embed_last(self, tail_TN: Tensor, position: Tensor) -> Tensor:
        """The same, [T, D], for the last of each tail's N ids; those before the document's start may be any."""
        x_TD = self.embedding(tail_TN[:, -1])
        return x_TD if self.ngram_hash is None else x_TD + self.ngram_hash.of_last(tail_TN, position)

    def byte_states(self, x_TD: Tensor, position: Tensor, mask: Mask) -> list[Tensor]:
        """The byte states [T, D] after each layer that patches look at; the last ones are the encoder's output."""
        rotary = self.stack.rotary(position)
        states = []
        for block in self.stack.blocks:
            x_TD = block(x_TD, rotary, mask)
            states.append(x_TD)
        return states[-len(self.cross_attention) :]

    def queries(self, pooled_PD: Tensor) -> Tensor:
        """The K queries of each patch, [P, K, D], from the maximum of its bytes."""
        queries = self.pooled_to_queries(pooled_PD).to(pooled_PD.dtype)  # under autocast too, states stay in float32
        return queries.unflatten(-1, (self.settings.cross_attention.k, -1))

    def patch_states(self, states: list[Tensor], batch: PatchedStream) -> Tensor:
        """The K states of each patch, [P, K, D], from its bytes'."""
        own = ByteRanges.of(batch.patch, batch.num_patches)
        patches_PKD = self.queries(pool_patches(states[0], own))
        for cross, h_TD in zip(self.cross_attention, states, strict=True):
            patches_PKD = cross(patches_PKD, h_TD, own)
        return patches_PKD

    def forward(self, batch: PatchedStream) -> tuple[Tensor, Tensor]:
        """Byte states [T, D] and patch states [P, K, D]."""
        mask = self.stack.mask(batch.document, batch.num_documents)
        states = self.byte_states(self.embed(batch), batch.position, mask)
        return states[-1], self.patch_states(states, batch)


class GlobalTransformer(nn.Module):
    """Patches to patches; no final norm. (Section 3.1)"""

    def __init__(self, settings: BLTSettings):
        super().__init__()
        dim_in = settings.cross_attention.k * settings.encoder.dim
        dim = settings.global_transformer.dim
        self.projection = nn.Linear(dim_in, dim, bias=False) if dim_in != dim else nn.Identity()
        self.stack = Stack(settings.global_transformer)

    def forward(self, patches_PKD: Tensor, position: Tensor, mask: Mask) -> Tensor:
        """[P, K, D] -> [P, G]"""
        x_PG = self.projection(patches_PKD.flatten(1)).to(patches_PKD.dtype)
        return self.stack(x_PG, position, mask)


class LocalDecoder(nn.Module):
    """Byte states and patches to the logits of the next bytes. (Section 3.3)"""

    def __init__(self, settings: BLTSettings):
        super().__init__()
        decoder, cross = settings.decoder, settings.cross_attention
        self.settings = settings
        self.patch_to_keys = nn.Linear(settings.global_transformer.dim, cross.k * decoder.dim, bias=False)
        self.cross_attention = nn.ModuleList(
            DecoderCrossAttention(decoder.dim, cross, decoder.norm_eps)
            for _ in range(decoder.num_layers if cross.all_layers_decoder else 1)
        )
        self.stack = Stack(decoder)
        self.norm = nn.RMSNorm(decoder.dim, eps=decoder.norm_eps)
        self.output = nn.Linear(decoder.dim, VOCAB_SIZE, bias=False)

    def keys(self, patches_PG: Tensor) -> Tensor:
        """The K key states of each patch, [P, K, D]."""
        return self.patch_to_keys(patches_PG).unflatten(-1, (self.settings.cross_attention.k, -1))

    def forward(self, h_TD: Tensor, patches_PG: Tensor, batch: PatchedStream) -> Tensor:
        """Logits, float32 [T, V]."""
        keys_PKD = self.keys(patches_PG).to(h_TD.dtype)
        read = ByteRanges.of(batch.read, batch.num_patches)
        mask = self.stack.mask(batch.document, batch.num_documents)
        h_TD = self.states(h_TD, batch.position, mask, lambda layer, h: self.cross_attention[layer](h, keys_PKD, read))
        return self.logits(h_TD)

    def states(
        self, h_TD: Tensor, position: Tensor, mask: Mask, read_patches: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        """Byte states after all layers, [T, D].

        Args:
            read_patches: lets byte states [T, D] look at their patches, by the number of the cross-attention.
        """
        rotary = self.stack.rotary(position)
        for layer, block in enumerate(self.stack.blocks):
            if layer < len(self.cross_attention):
                h_TD = read_patches(layer, h_TD)
            h_TD = block(h_TD, rotary, mask)
        return h_TD

    def logits(self, h_TD: Tensor) -> Tensor:
        """[T, D] -> float32 [T, V]"""
        return self.output(self.norm(h_TD)).float()


class BLTModel(nn.Module):
    def __init__(self, settings: BLTSettings):
        super().__init__()
        self.settings = settings
        self.encoder = LocalEncoder(settings)
        self.global_transformer = GlobalTransformer(settings)
        self.decoder = LocalDecoder(settings)
        init_weights(self)

    def forward(self, batch: PatchedStream) -> Tensor:
        """Logits of the id that follows each id, float32 [T, V]."""
        h_TD, patches_PKD = self.encoder(batch)
        mask = self.global_transformer.stack.mask(batch.patch_document, batch.num_documents)
        patches_PG = self.global_transformer(patches_PKD, batch.patch_position, mask)
        return self.decoder(h_TD, patches_PG, batch)
