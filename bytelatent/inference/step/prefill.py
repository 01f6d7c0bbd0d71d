"""Whole prompts at the speed of the card: the same models, with joined products and kernels in their blocks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bytelatent.inference.decoder import Decoder
from bytelatent.inference.kv_cache import Keep, KeepPatchKeys
from bytelatent.inference.step.packed_weights import BlockWeights, BLTWeights, ByteLMWeights, StackWeights
from bytelatent.kernels.decode_cross_attention import decoder_cross_attention_step
from bytelatent.kernels.gated_product import ROWS, can_gate, fast_row_scale, gated_product
from bytelatent.kernels.hash_embed import hash_embed, ngram_powers
from bytelatent.kernels.quantized import dense
from bytelatent.kernels.rotary import cos_sin
from bytelatent.kernels.skinny_linear import gate
from bytelatent.kernels.window_attention import can_attend, first_seen, window_attention
from bytelatent.model import BLTModel, ByteLM, PatchedStream, Stream, add_patches
from bytelatent.model.attention import Look
from bytelatent.model.ngram_hash import PRIMES
from bytelatent.model.settings import StackSettings
from bytelatent.patching import PatchSettings
from bytelatent.vocab import OFFSET

# Shapes: T positions, P patches, K keys a patch, L layers, D width, H heads, J key/value heads, E head size, A = E/2
# angles


@dataclass
class RunLook:
    """A run of positions up to each one, where documents begin and windows end, with rotary angles."""

    low: Tensor  # [T] the first place that each position sees
    cos: Tensor  # [T, A]
    sin: Tensor  # [T, A]
    keep: Callable[[Tensor, Tensor], None]  # takes each layer's rotated keys, and values

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        """Of queries and keys that are not rotated yet; the keys are rotated in place."""
        found = window_attention(q_THE, k_TJE, v_TJE, self.low, self.cos, self.sin)
        self.keep(k_TJE, v_TJE)
        return found


class FastBlock(nn.Module):
    """A block in place of the model's own, with the same call.

    A prompt's many positions share a matrix, so a quantized one is written out for them, one block after another.
    """

    def __init__(self, settings: StackSettings, weights: BlockWeights):
        super().__init__()
        self.settings, self.weights = settings, weights

    def forward(self, x_TD: Tensor, rotary: Any, look: RunLook) -> Tensor:
        settings, weights = self.settings, self.weights
        shape, eps = (settings.dim,), settings.norm_eps
        qkv = F.linear(F.rms_norm(x_TD, shape, None, eps), dense(weights.qkv, x_TD.dtype))
        q, k, v = qkv.unflatten(-1, (3, settings.num_heads, settings.head_dim)).unbind(1)
        x_TD = torch.addmm(x_TD, look.attend(q, k, v).flatten(1), dense(weights.output, x_TD.dtype).T)
        return x_TD.addmm_(self._hidden(x_TD), dense(weights.down, x_TD.dtype).T)

    def _hidden(self, x_TD: Tensor) -> Tensor:
        gate_up, eps = dense(self.weights.gate_up, x_TD.dtype), self.settings.norm_eps
        size = x_TD.shape[0]
        if x_TD.is_cuda and size >= 16 * ROWS and size % ROWS == 0 and can_gate(*gate_up.shape):
            return gated_product(x_TD, fast_row_scale(x_TD, eps), gate_up)
        both = F.linear(F.rms_norm(x_TD, (self.settings.dim,), None, eps), gate_up)
        return gate(both)


@dataclass
class _Captured:
    """A stack's work on so many positions as a CUDA graph, with what it reads and what it leaves."""

    graph: Any
    x_TD: Tensor
    look: RunLook
    k_LTJE: Tensor  # each layer's rotated keys
    v_LTJE: Tensor
    out_TD: Tensor


class FastStack(nn.Module):
    """A stack in place of the model's own, with the same calls.

    The kernels of a short prompt take less time than the host needs to start them, so there they are a CUDA graph,
    one for each size; a stream is padded to the next.
    """

    SIZES: tuple[int, ...] = (128, 256, 512, 1024)

    def __init__(self, settings: StackSettings, weights: StackWeights):
        super().__init__()
        self.settings = settings
        self.blocks = nn.ModuleList(FastBlock(settings, block) for block in weights.blocks)
        self._captured: dict[int, _Captured] = {}

    def rotary(self, position: Tensor) -> None:
        """None: a `RunLook` knows the angles."""

    def forward(self, x_TD: Tensor, position: Tensor, look: RunLook) -> Tensor:
        size = next((size for size in self.SIZES if len(x_TD) <= size), None)
        if size is None or not x_TD.is_cuda:
            return self._read(x_TD, look)
        if size not in self._captured:
            self._captured[size] = self._capture(x_TD, size)
        captured, here = self._captured[size], slice(0, len(x_TD))
        captured.x_TD[here] = x_TD
        captured.look.low[here], captured.look.cos[here], captured.look.sin[here] = look.low, look.cos, look.sin
        captured.graph.replay()
        assert isinstance(look.keep, Keep)
        look.keep.layers(captured.k_LTJE, captured.v_LTJE)
        return captured.out_TD[here].clone()

    def _read(self, x_TD: Tensor, look: RunLook) -> Tensor:
        for block in self.blocks:
            x_TD = block(x_TD, None, look)
        return x_TD

    def _capture(self, like_TD: Tensor, size: int) -> _Captured:
        device, angles = like_TD.device, self.settings.head_dim // 2
        low = torch.arange(size, dtype=torch.int32, device=device)  # what is not written sees itself only
        cos, sin = torch.ones(size, angles, device=device), torch.zeros(size, angles, device=device)
        kept: list[tuple[Tensor, Tensor]] = []
        look = RunLook(low, cos, sin, lambda k_THE, v_THE: kept.append((k_THE, v_THE)))
        x_TD = like_TD.new_zeros(size, like_TD.shape[1])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self._read(x_TD, look)  # compiles the kernels
            stream.synchronize()
            kept.clear()
            with torch.cuda.graph(graph, stream=stream):
                out_TD = self._read(x_TD, look)
                k_LTJE, v_LTJE = (torch.stack(layers) for layers in zip(*kept, strict=True))
        torch.cuda.current_stream().wait_stream(stream)
        return _Captured(graph, x_TD, look, k_LTJE, v_LTJE, out_TD)


class FastDecoder(Decoder):
    """A `Decoder` that reads prompts fast, and holds the packed weights that `FastStep` reads, too."""

    def __init__(self, model: BLTModel | ByteLM, patching: PatchSettings | None, byte_lm: ByteLM | None):
        super().__init__(model, patching, byte_lm)
        lm = model if isinstance(model, ByteLM) else self.byte_lm
        self.byte_lm_weights = ByteLMWeights.of(lm) if lm is not None else None
        self.blt_weights = BLTWeights.of(model) if isinstance(model, BLTModel) else None
        self._fast: set[StackSettings] = set()
        if self.byte_lm_weights is not None and lm is not None:
            fast = self._with_fast_blocks(lm, self.byte_lm_weights.stack)
            if isinstance(model, ByteLM):
                self._reads = fast
            else:
                self._reads_byte_lm = fast
        if self.blt_weights is not None:
            weights = self.blt_weights
            self._reads = copy.copy(model)
            self._reads._modules = dict(model._modules)
            stacks = {"encoder": weights.encoder, "global_transformer": weights.middle, "decoder": weights.decoder}
            for name, stack in stacks.items():
                self._reads._modules[name] = self._with_fast_blocks(getattr(model, name), stack)

    def _with_fast_blocks(self, module: Any, weights: StackWeights) -> Any:
        """The module with other blocks in its stack, where the kernels can run it; all else is shared."""
        if not _can_run(weights.settings, next(module.parameters())):
            return module
        self._fast.add(weights.settings)
        fast = copy.copy(module)
        fast._modules = {**module._modules, "stack": FastStack(weights.settings, weights)}
        return fast

    def _padded(self, stream: Stream) -> Stream:
        more = -len(stream.ids) % ROWS
        ids, document = F.pad(stream.ids, (0, more), value=OFFSET), F.pad(stream.document, (0, more), value=-1)
        return Stream(ids, document, F.pad(stream.position, (0, more)))

    def _with_patches(self, stream: Stream, starts: Tensor) -> PatchedStream:
        exact = add_patches(stream, starts)
        slots = -(-exact.num_patches // ROWS) * ROWS
        return add_patches(stream, starts, num_patches=slots)

    def _embed(self, batch: PatchedStream) -> Tensor:
        assert isinstance(self.model, BLTModel)
        encoder = self.model.encoder
        if encoder.ngram_hash is None:
            return encoder.embedding(batch.ids)
        settings = encoder.ngram_hash.settings
        place = torch.arange(len(batch.ids), device=batch.ids.device)
        back = torch.arange(1 - max(settings.sizes), 1, device=batch.ids.device)
        tail = batch.ids[(place[:, None] + back).clamp(min=0)]
        powers = ngram_powers(PRIMES[: settings.num_functions], settings.sizes, batch.ids.device)
        return hash_embed(tail, batch.position, powers, encoder.ngram_hash.tables.weight, encoder.embedding.weight)

    def _read_patches(
        self, decoder: Any, keys_PKD: Tensor, read: Tensor, keep: KeepPatchKeys
    ) -> Callable[[int, Tensor], Tensor]:
        assert self.blt_weights is not None
        weights, stack = self.blt_weights.decoder_cross, self.blt_weights.settings.decoder
        heads = (self.blt_weights.settings.cross_attention.num_heads, -1)
        row, reads = read.clamp(min=0), read >= 0

        def normed(x: Tensor) -> Tensor:
            """Without a norm's weights, in which alone those of the layers differ: they are in the matrices."""
            return F.rms_norm(x, (stack.dim,), None, stack.norm_eps)

        normed_PKD = normed(keys_PKD)

        def read_patches(layer: int, h_TD: Tensor) -> Tensor:
            cross, dtype = weights[layer], h_TD.dtype
            matrices = dense(cross.key_value, dtype).chunk(2)
            k_PKHE, v_PKHE = (F.linear(normed_PKD, matrix).unflatten(-1, heads) for matrix in matrices)
            keep(layer, k_PKHE, v_PKHE)
            q_THE = F.linear(normed(h_TD), dense(cross.query, dtype)).unflatten(-1, heads)
            found = decoder_cross_attention_step(q_THE, k_PKHE, v_PKHE, reads, row_B=row).flatten(1)
            return torch.addmm(h_TD, found, dense(cross.output, dtype).T, beta=2)

        return read_patches

    def _look(self, stack: StackSettings, document: Tensor, position: Tensor, keep: Keep) -> Look:
        if stack not in self._fast:
            return super()._look(stack, document, position, keep)
        cos, sin = cos_sin(position, stack.head_dim, stack.rope_theta)
        return RunLook(first_seen(position, stack.window), cos, sin, keep)


def _can_run(settings: StackSettings, some: Tensor) -> bool:
    exact = some.dtype != torch.float32 or not some.is_cuda  # on the card the kernels would round float32 products
    return exact and can_attend(settings.num_heads, settings.kv_heads, settings.head_dim)
