"""The Byte Latent Transformer: a local encoder, a global transformer over patches, a local decoder.

    bytes -> local encoder -> patches -> global transformer -> patches -> local decoder -> next bytes

Source: Pagnoni et al. 2024, figure 2 and section 3.
"""

from torch import Tensor, nn

from bytelatent.model.attention import build_mask
from bytelatent.model.block import Stack, init_weights
from bytelatent.model.ngram_hash import NgramHashEmbedding
from bytelatent.model.patch_attention import GatherBytes, ReadPatches, pool_patches
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
        self.embedding = nn.Embedding(VOCAB_SIZE, encoder.dim)
        self.ngram_hash = NgramHashEmbedding(settings.ngram_hash, encoder.dim) if settings.ngram_hash else None
        self.stack = Stack(encoder)
        self.pooled_to_queries = nn.Linear(encoder.dim, cross.k * encoder.dim, bias=False)
        self.cross_attention = nn.ModuleList(
            GatherBytes(encoder.dim, cross, encoder.norm_eps)
            for _ in range(encoder.num_layers if cross.all_layers_encoder else 1)
        )

    def embed(self, batch: PatchedStream) -> Tensor:
        """A byte's embedding and the sum of its n-grams', [T, D]."""
        x_TD = self.embedding(batch.ids)
        if self.ngram_hash is None:
            return x_TD
        history = batch.position if self.ngram_hash.settings.stop_at_document else batch.history
        return x_TD + self.ngram_hash(batch.ids, history)

    def queries(self, h_TD: Tensor, batch: PatchedStream) -> Tensor:
        """The K queries of each patch, from the maximum of its bytes, [P, K, D]."""
        pooled_PD = pool_patches(h_TD, batch.patch, batch.num_patches)
        queries = self.pooled_to_queries(pooled_PD).to(h_TD.dtype)  # under autocast too, states stay in float32
        return queries.unflatten(-1, (self.settings.cross_attention.k, -1))

    def forward(self, batch: PatchedStream) -> tuple[Tensor, Tensor]:
        """Byte states [T, D] and patch states [P, K, D]."""
        h_TD = self.embed(batch)
        rotary = self.stack.rotary(batch.position)
        mask = build_mask(batch.document, self.settings.encoder.window)
        patches_PKD = None
        first_with_cross_attention = len(self.stack.blocks) - len(self.cross_attention)
        for layer, block in enumerate(self.stack.blocks):
            h_TD = block(h_TD, rotary, mask)
            if layer >= first_with_cross_attention:
                if patches_PKD is None:
                    patches_PKD = self.queries(h_TD, batch)
                gather_bytes = self.cross_attention[layer - first_with_cross_attention]
                patches_PKD = gather_bytes(patches_PKD, h_TD, batch.patch)
        assert patches_PKD is not None
        return h_TD, patches_PKD


class GlobalTransformer(nn.Module):
    """Patches to patches; no final norm. (Section 3.1)"""

    def __init__(self, settings: BLTSettings):
        super().__init__()
        dim_in = settings.cross_attention.k * settings.encoder.dim
        dim = settings.global_transformer.dim
        self.projection = nn.Linear(dim_in, dim, bias=False) if dim_in != dim else nn.Identity()
        self.stack = Stack(settings.global_transformer)

    def forward(self, patches_PKD: Tensor, batch: PatchedStream) -> Tensor:
        """[P, K, D] -> [P, G]"""
        x_PG = self.projection(patches_PKD.flatten(1)).to(patches_PKD.dtype)
        return self.stack(x_PG, batch.patch_position, build_mask(batch.patch_document, window=None))


class LocalDecoder(nn.Module):
    """Byte states and patches to the logits of the next bytes. (Section 3.3)"""

    def __init__(self, settings: BLTSettings):
        super().__init__()
        decoder, cross = settings.decoder, settings.cross_attention
        self.settings = settings
        self.patch_to_keys = nn.Linear(settings.global_transformer.dim, cross.k * decoder.dim, bias=False)
        self.cross_attention = nn.ModuleList(
            ReadPatches(decoder.dim, cross, decoder.norm_eps)
            for _ in range(decoder.num_layers if cross.all_layers_decoder else 1)
        )
        self.stack = Stack(decoder)
        self.norm = nn.RMSNorm(decoder.dim, eps=decoder.norm_eps)
        self.output = nn.Linear(decoder.dim, VOCAB_SIZE, bias=False)

    def forward(self, h_TD: Tensor, patches_PG: Tensor, batch: PatchedStream) -> Tensor:
        """Logits, float32 [T, V]."""
        keys = self.patch_to_keys(patches_PG).to(h_TD.dtype)
        keys_PKD = keys.unflatten(-1, (self.settings.cross_attention.k, -1))
        rotary = self.stack.rotary(batch.position)
        mask = build_mask(batch.document, self.settings.decoder.window)
        for layer, block in enumerate(self.stack.blocks):
            if layer < len(self.cross_attention):
                h_TD = self.cross_attention[layer](h_TD, keys_PKD, batch.read)
            h_TD = block(h_TD, rotary, mask)
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
        patches_PG = self.global_transformer(patches_PKD, batch)
        return self.decoder(h_TD, patches_PG, batch)
