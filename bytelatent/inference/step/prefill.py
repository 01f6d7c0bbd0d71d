"""Prefill at a GPU's speed: the same models with joined products and kernels in their blocks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bytelatent.inference.cached_attention import NewPositions, StoreNewest
from bytelatent.inference.decoder import Decoder
from bytelatent.inference.kv_cache import KVCache
from bytelatent.inference.settings import KVCacheNumbers
from bytelatent.inference.step.cuda_graph import Graph
from bytelatent.inference.step.packed_weights import BlockWeights, BLTWeights, ByteLMWeights, CrossWeights, StackWeights
from bytelatent.kernels.decode_cross_attention import decoder_cross_attention_step
from bytelatent.kernels.gated_product import ROWS, can_gate, gate, gated_product, row_scale
from bytelatent.kernels.hash_embed import hash_embed
from bytelatent.kernels.patch_attention import ByteRanges
from bytelatent.kernels.quantized import dense
from bytelatent.kernels.rotary import cos_sin
from bytelatent.kernels.window_attention import can_attend, first_seen, window_attention
from bytelatent.model import BLTModel, BLTSettings, ByteLM, LanguageModel, Stream
from bytelatent.model.attention import Mask
from bytelatent.model.blt import BLTCache, LocalEncoder
from bytelatent.model.settings import StackSettings
from bytelatent.patching import PatchSettings

# Shapes: T positions, P patches, K keys per patch, L layers, D width, H heads, J key/value heads, E head size, A = E/2


@dataclass
class RunAttention:
    """Attention to a run of positions up to each one, with a rotary embedding; padded to a multiple of `ROWS`."""

    low: Tensor  # [T] the first index that each position sees
    cos: Tensor  # [T, A]
    sin: Tensor  # [T, A]
    store: Callable[[Tensor, Tensor], None]  # takes each layer's rotated keys, and values
    in_8_bits: bool = False  # whether keys and values are those of a KV cache in 8 bits

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        """Attend with queries and keys that are not yet rotated; the keys are rotated in place."""
        found = window_attention(q_THE, k_TJE, v_TJE, self.low, self.cos, self.sin, self.in_8_bits)
        self.store(k_TJE, v_TJE)
        return found


class PrefillBlock(nn.Module):
    """A block in place of the model's own, with the same call.

    A prompt's many positions share a matrix, so a quantized one is written out for them, one block after another.
    """

    def __init__(self, settings: StackSettings, weights: BlockWeights):
        super().__init__()
        self.settings, self.weights = settings, weights

    def forward(self, x_TD: Tensor, rotary: Any, attention: RunAttention) -> Tensor:
        settings, weights = self.settings, self.weights
        shape, eps = (settings.dim,), settings.norm_eps
        qkv = F.linear(F.rms_norm(x_TD, shape, None, eps), dense(weights.qkv, x_TD.dtype))
        qkv = weights.finished(qkv, eps).unflatten(-1, (3, settings.num_heads, settings.head_dim))
        q, k, v = qkv.unbind(1)
        x_TD = torch.addmm(x_TD, attention.attend(q, k, v).flatten(1), dense(weights.output, x_TD.dtype).T)
        return x_TD.addmm_(self._hidden(x_TD), dense(weights.down, x_TD.dtype).T)

    def _hidden(self, x_TD: Tensor) -> Tensor:
        gate_up, eps = dense(self.weights.gate_up, x_TD.dtype), self.settings.norm_eps
        size = x_TD.shape[0]
        if x_TD.is_cuda and size >= 16 * ROWS and size % ROWS == 0 and can_gate(*gate_up.shape):
            return gated_product(x_TD, row_scale(x_TD, eps), gate_up)
        both = F.linear(F.rms_norm(x_TD, (self.settings.dim,), None, eps), gate_up)
        return gate(both)


@dataclass
class _Captured:
    """A stack's work on a number of positions as a CUDA graph, with its inputs and outputs."""

    graph: Graph
    x_TD: Tensor
    attention: RunAttention
    k_LTJE: Tensor  # each layer's rotated keys
    v_LTJE: Tensor
    out_TD: Tensor


class PrefillStack(nn.Module):
    """A stack in place of the model's own, with the same calls.

    The kernels of a short prompt take less time than the host needs to start them, so there they are a CUDA graph,
    one for each size; a stream is padded to the next.
    """

    SIZES: tuple[int, ...] = (128, 256, 512, 1024)

    def __init__(self, settings: StackSettings, weights: StackWeights):
        super().__init__()
        self.settings = settings
        self.blocks = nn.ModuleList(PrefillBlock(settings, block) for block in weights.blocks)
        self._captured: dict[int, _Captured] = {}

    def rotary(self, position: Tensor) -> None:
        """None: `RunAttention` holds the rotary embedding."""

    def forward(self, x_TD: Tensor, position: Tensor, attention: RunAttention) -> Tensor:
        num = len(x_TD)
        size = next((size for size in self.SIZES if num <= size), None)
        if size is None or not x_TD.is_cuda:
            return self._read(F.pad(x_TD, (0, 0, 0, len(attention.low) - num)), attention)[:num]
        if size not in self._captured:
            self._captured[size] = self._capture(x_TD, size, attention.in_8_bits)
        captured, here = self._captured[size], slice(0, num)
        captured.x_TD[here] = x_TD
        to, store = captured.attention, attention.store
        to.low[here], to.cos[here], to.sin[here] = attention.low[:num], attention.cos[:num], attention.sin[:num]
        captured.graph.replay()
        assert isinstance(store, StoreNewest)
        store.all_layers(captured.k_LTJE, captured.v_LTJE)
        return captured.out_TD[here].clone()

    def _read(self, x_TD: Tensor, attention: RunAttention) -> Tensor:
        for block in self.blocks:
            x_TD = block(x_TD, None, attention)
        return x_TD

    def _capture(self, like_TD: Tensor, size: int, in_8_bits: bool) -> _Captured:
        device, half = like_TD.device, self.settings.head_dim // 2
        low = torch.arange(size, dtype=torch.int32, device=device)  # what is not written sees itself only
        cos, sin = torch.ones(size, half, device=device), torch.zeros(size, half, device=device)
        stored: list[tuple[Tensor, Tensor]] = []
        attention = RunAttention(low, cos, sin, lambda k_THE, v_THE: stored.append((k_THE, v_THE)), in_8_bits)
        x_TD = like_TD.new_zeros(size, like_TD.shape[1])
        results: list[Tensor] = []

        def read() -> None:
            stored.clear()
            results[:] = [self._read(x_TD, attention)]
            results.extend(torch.stack(layers) for layers in zip(*stored, strict=True))

        graph = Graph(read, overlap=False)
        out_TD, k_LTJE, v_LTJE = results
        return _Captured(graph, x_TD, attention, k_LTJE, v_LTJE, out_TD)


class PrefillEncoder(LocalEncoder):
    """The local encoder with one kernel for the sum of all embeddings."""

    def embed(self, batch: Stream, cache: BLTCache | None = None) -> Tensor:
        assert cache is not None
        if self.ngram_hash is None:
            return self.embedding(batch.ids)
        powers = self.ngram_hash.powers(batch.ids.device)
        tables, embedding = self.ngram_hash.tables.weight, self.embedding.weight
        return hash_embed(cache.tail_TW, batch.position, powers, tables, embedding)


class PrefillDecoderCrossAttention(nn.Module):
    """A cross-attention in place of the model's own, with the same calls."""

    def __init__(self, settings: BLTSettings, weights: CrossWeights):
        super().__init__()
        assert settings.cross_attention is not None
        self.weights, self.eps = weights, settings.decoder.norm_eps
        self.heads = (settings.cross_attention.num_heads, -1)

    def keys_values(self, x_PKD: Tensor) -> tuple[Tensor, Tensor]:
        matrices = dense(self.weights.key_value, x_PKD.dtype).chunk(2)
        k_PKHE, v_PKHE = (F.linear(self._norm(x_PKD), matrix).unflatten(-1, self.heads) for matrix in matrices)
        return k_PKHE, v_PKHE

    def attend(self, h_TD: Tensor, k_PKHE: Tensor, v_PKHE: Tensor, read: ByteRanges) -> Tensor:
        weights, dtype = self.weights, h_TD.dtype
        q_THE = F.linear(self._norm(h_TD), dense(weights.query, dtype)).unflatten(-1, self.heads)
        row_T, reads_T = read.patch_T.clamp(min=0), read.patch_T >= 0
        found = decoder_cross_attention_step(q_THE, k_PKHE, v_PKHE, reads_T, row_T=row_T).flatten(1)
        return torch.addmm(h_TD, found, dense(weights.output, dtype).T, beta=2)

    def _norm(self, x: Tensor) -> Tensor:
        """Without the norm's weights, which are in the matrices."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps)


class PrefillDecoder(Decoder):
    """A `Decoder` that reads prompts fast, and holds the packed weights that the captured step reads, too."""

    pad_to = ROWS

    def __init__(
        self,
        model: BLTModel | LanguageModel,
        patching: PatchSettings | None,
        byte_lm: ByteLM | None,
        kv_cache: KVCacheNumbers = "full",
    ):
        super().__init__(model, patching, byte_lm, kv_cache)
        lm = model if isinstance(model, ByteLM) else self.byte_lm
        self.byte_lm_weights = ByteLMWeights.of(lm) if lm is not None else None
        self.blt_weights = BLTWeights.of(model) if isinstance(model, BLTModel) else None
        self._fast: set[StackSettings] = set()
        if self.byte_lm_weights is not None and lm is not None:
            fast = self._with_fast_blocks(lm, self.byte_lm_weights.stack)
            if isinstance(model, ByteLM):
                self._prompt_model = fast
            else:
                self._prompt_byte_lm = fast
        if self.blt_weights is not None:
            self._prompt_model = self._fast_blt(model, self.blt_weights)

    def _fast_blt(self, model: Any, weights: BLTWeights) -> Any:
        encoder = self._with_fast_blocks(model.encoder, weights.encoder)
        if encoder is model.encoder:
            encoder = copy.copy(encoder)
        encoder.__class__ = PrefillEncoder
        decoder = with_modules(
            self._with_fast_blocks(model.decoder, weights.decoder),
            cross_attention=nn.ModuleList(
                PrefillDecoderCrossAttention(weights.settings, cross) for cross in weights.decoder_cross
            ),
        )
        middle = self._with_fast_blocks(model.global_transformer, weights.middle)
        return with_modules(model, encoder=encoder, global_transformer=middle, decoder=decoder)

    def _with_fast_blocks(self, module: Any, weights: StackWeights) -> Any:
        """The module with other blocks in its stack, where the kernels can run it; all else is shared."""
        if not can_run(weights.settings, next(module.parameters())):
            return module
        self._fast.add(weights.settings)
        return with_modules(module, stack=PrefillStack(weights.settings, weights))

    def _prompt_attention(self, cache: KVCache, stack: StackSettings, new: NewPositions, num_padding: int) -> Mask:
        if stack not in self._fast:
            return super()._prompt_attention(cache, stack, new, num_padding)
        position = F.pad(new.position, (0, -len(new.position) % ROWS))
        cos, sin = cos_sin(position, stack.head_dim, stack.rope_theta, stack.rope_scaling)
        store = StoreNewest(cache, new)
        return RunAttention(first_seen(position, stack.window), cos, sin, store, self.kv_cache == "int8")


def with_modules(module: Any, **modules: nn.Module) -> Any:
    """A copy of a module in which some modules are others; all else is shared."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, **modules}
    return copied


def can_run(settings: StackSettings, some: Tensor) -> bool:
    """Whether the kernels can run a stack of these settings, in the precision and where `some` weight is."""
    exact = some.dtype != torch.float32 or not some.is_cuda  # on the card the kernels would round float32 products
    return exact and can_attend(settings.num_heads, settings.kv_heads, settings.head_dim)
