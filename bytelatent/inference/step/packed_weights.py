"""A model's matrices as the kernels of a decode step read them: joined, and with the norms before them folded in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.inference.kv_cache import BLOCK
from bytelatent.inference.quantize import QuantizedLinear
from bytelatent.kernels.decode_attention import launch_for_attention, split_scratch
from bytelatent.kernels.gated_product import interleaved
from bytelatent.kernels.quantized import Matrix, by_rows
from bytelatent.kernels.rotary import rotary_embedding
from bytelatent.kernels.skinny_linear import fold_norm
from bytelatent.model import BLTModel, BLTSettings, ByteLM, LanguageModel
from bytelatent.model.settings import StackSettings

# Shapes: D width, H heads, J key/value heads, E head size, F feed-forward width, K keys per patch


@dataclass(frozen=True)
class BlockWeights:
    qkv: Matrix  # [(H+2J)*E, D] with the norm
    output: Matrix  # [D, H*E]
    gate_up: Matrix  # [2F, D] row by row in turn, with the norm
    down: Matrix  # [D, F]
    bias: Tensor | None = None  # [(H+2J)*E] of queries, keys and values
    qk_norm: Tensor | None = None  # [H+J, E] float32, the weights of the norms of queries and keys

    @classmethod
    def of(cls, block: Any) -> "BlockWeights":
        attention, feed_forward = block.attention, block.feed_forward
        products, bias, qk_norm = [attention.query, attention.key, attention.value], None, None
        if attention.query.bias is not None:
            bias = torch.cat([linear.bias.detach() for linear in products])
        if attention.has_qk_norm:
            pairs = ((attention.query_norm, attention.query), (attention.key_norm, attention.key))
            heads = [n.weight.detach().float().expand(lin.out_features // len(n.weight), -1) for n, lin in pairs]
            qk_norm = torch.cat(heads)
        return cls(
            qkv=_joined(_cat, products, block.attention_norm),
            output=_matrix(attention.output),
            gate_up=_joined(interleaved, [feed_forward.gate, feed_forward.up], block.feed_forward_norm),
            down=_matrix(feed_forward.down),
            bias=bias,
            qk_norm=qk_norm,
        )

    def finished(self, qkv: Tensor, eps: float) -> Tensor:
        """Queries, keys and values with their biases and norms, from the product; it may be overwritten."""
        if self.bias is not None:
            qkv += self.bias
        if self.qk_norm is not None:
            num_heads, head_dim = self.qk_norm.shape
            qk = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
            qk.copy_(F.rms_norm(qk.float(), (head_dim,), None, eps) * self.qk_norm)
        return qkv


@dataclass
class StackWeights:
    settings: StackSettings
    blocks: list[BlockWeights]
    rotary: Tensor  # [positions, E/2, 2]
    _launches: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, stack: Any) -> "StackWeights":
        blocks = [BlockWeights.of(block) for block in stack.blocks]
        made = cls(stack.settings, blocks, torch.zeros(0, device=blocks[0].output.device))
        made.reserve(BLOCK)
        return made

    @property
    def eps(self) -> float:
        return self.settings.norm_eps

    def launch(self, sequences: int, side: int = 0) -> dict[str, Any]:
        """How the attention kernel is launched for this number of sequences, on one of the sides that run at once.

        Each is made once, since a CUDA graph knows its tensors by their addresses.
        """
        if self.rotary.device.type != "cuda":
            return {}
        if (sequences, side) not in self._launches:
            settings = self.settings
            heads, reach = settings.num_heads, settings.window or BLOCK
            launch = launch_for_attention(sequences, heads, settings.kv_heads, reach)
            scratch = split_scratch(sequences, heads, settings.head_dim, launch.splits, self.rotary.device)
            self._launches[sequences, side] = {"launch": launch, "scratch": scratch}
        return self._launches[sequences, side]

    def reserve(self, positions: int) -> None:
        """Grow the rotary embedding to this number of positions."""
        if positions > len(self.rotary):
            settings = self.settings
            position = torch.arange(positions, device=self.rotary.device)
            self.rotary = rotary_embedding(position, settings.head_dim, settings.rope_theta, settings.rope_scaling)


@dataclass(frozen=True)
class CrossWeights:
    query: Matrix  # [H*E, D] with the norm
    key_value: Matrix  # [2*H*E, D] with the norm; grouped heads are repeated
    output: Matrix  # [D, H*E]

    @classmethod
    def of(cls, cross: Any) -> "CrossWeights":
        def repeated(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (-1, cross.head_dim)).repeat_interleave(cross.group, dim=0).flatten(0, 1)

        def both(key: Tensor, value: Tensor) -> Tensor:
            return torch.cat([repeated(key), repeated(value)])

        key_value = _joined(both, [cross.key, cross.value], cross.key_value_norm)
        return cls(_matrix(cross.query, cross.query_norm), key_value, _matrix(cross.output))


@dataclass(frozen=True)
class ByteLMWeights:
    embedding: Tensor  # [V, D]
    stack: StackWeights
    output: Tensor  # [V, D] with the norm

    @classmethod
    def of(cls, model: ByteLM) -> "ByteLMWeights":
        return cls(model.embedding.weight.detach(), StackWeights.of(model.stack), _head(model))


@dataclass(frozen=True)
class BLTWeights:
    settings: BLTSettings
    encoder: StackWeights
    encoder_cross: list[CrossWeights]
    pooled_to_queries: Matrix | None  # [K*D, D]; None without cross-attention
    projection: Matrix | None  # [G, K*D]
    middle: StackWeights
    patch_to_keys: Matrix | None  # [K*D, G]
    patch_key_values: (
        Matrix  # [Y*2*H*E, D] of all the decoder's cross-attentions, each with its norm; or [D, G] without
    )
    decoder: StackWeights
    decoder_cross: list[CrossWeights]
    output: Tensor  # [V, D] with the norm

    @classmethod
    def of(cls, model: BLTModel) -> "BLTWeights":
        encoder, middle, decoder = model.encoder, model.global_transformer, model.decoder
        decoder_cross = [CrossWeights.of(cross) for cross in decoder.cross_attention]
        projection: Any = middle.projection
        has_cross = has_cross_attention(model)
        if has_cross:
            key_values = _laid_out(by_rows(_cat, *(cross.key_value for cross in decoder_cross)))
        else:
            key_values = _matrix(decoder.patch_to_bytes, decoder.patch_norm)
        return cls(
            settings=model.settings,
            encoder=StackWeights.of(encoder.stack),
            encoder_cross=[CrossWeights.of(cross) for cross in encoder.cross_attention],
            pooled_to_queries=_matrix(encoder.pooled_to_queries) if has_cross else None,
            projection=None if isinstance(projection, torch.nn.Identity) else _matrix(projection),
            middle=StackWeights.of(middle.stack),
            patch_to_keys=_matrix(decoder.patch_to_keys) if has_cross else None,
            patch_key_values=key_values,
            decoder=StackWeights.of(decoder.stack),
            decoder_cross=decoder_cross,
            output=_head(decoder),
        )


def supports(model: BLTModel | LanguageModel, byte_lm: ByteLM | None) -> bool:
    """Whether the kernels can decode this model: heads of a power of two, from 16 on."""
    settings, sizes = model.settings, [byte_lm.settings.head_dim] if byte_lm is not None else []
    if isinstance(settings, BLTSettings):
        stacks = [settings.encoder, settings.global_transformer, settings.decoder]
        sizes += [stack.head_dim for stack in stacks]
        if settings.cross_attention is not None:
            sizes.append(settings.encoder.dim // settings.cross_attention.num_heads)
    else:
        sizes.append(settings.head_dim)
    return all(size >= 16 and size & (size - 1) == 0 for size in sizes)


def has_cross_attention(model: Any) -> bool:
    """Whether a model is a BLT with cross-attention."""
    return isinstance(model, BLTModel) and model.settings.cross_attention is not None


def _matrix(linear: Any, norm: Any = None) -> Matrix:
    """A layer's matrix, with the norm before it."""
    if isinstance(linear, QuantizedLinear):
        return linear.matrix  # the norm is in it
    weight = linear.weight.detach()
    return weight if norm is None else fold_norm(weight, norm.weight.detach())


def _head(module: Any) -> Tensor:
    return _laid_out(fold_norm(module.output.weight.detach(), module.norm.weight.detach()))


def _laid_out(matrix: Any) -> Any:
    """The same numbers; columns lie together where a CPU reads a tall matrix, in two thirds of the time for one row."""
    is_tall = isinstance(matrix, Tensor) and matrix.shape[0] > matrix.shape[1]
    return matrix.t().contiguous().t() if is_tall and matrix.device.type == "cpu" else matrix


def _joined(arrange: Callable[..., Tensor], linears: list[Any], norm: Any) -> Matrix:
    """The matrices of several layers, with the norm before them, as one."""
    return _laid_out(by_rows(arrange, *(_matrix(linear, norm) for linear in linears)))


def _cat(*rows: Tensor) -> Tensor:
    return torch.cat(rows)
