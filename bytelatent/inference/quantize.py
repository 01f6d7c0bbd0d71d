"""Models whose large matrices are quantized to one byte per number: half the memory of bfloat16, and of its reading.

All that reads the model, whole texts, prompts or byte by byte, multiplies with the same quantized numbers. The weights
of an RMSNorm are multiplied into the matrices after it first, as the kernels of decoding want them.

Not quantized: embeddings and hash tables, of which a byte reads few rows; the head, whose error would be that of the
logits; norms; and an entropy model, since other entropies would be other patches.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bytelatent.device import keep_precision
from bytelatent.errors import UserError
from bytelatent.inference.settings import Quantization
from bytelatent.kernels.quantized import QuantizedMatrix
from bytelatent.model import BLTModel, CrossAttention, LanguageModel
from bytelatent.model.block import Block
from bytelatent.model.blt import GlobalTransformer, LocalDecoder, LocalEncoder

Model = TypeVar("Model", bound=BLTModel | LanguageModel)


class QuantizedLinear(nn.Module):
    """In place of an `nn.Linear`; the norm before it is part of its matrix, and a bias stays as it is."""

    values: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("values", matrix.values)
        self.register_buffer("scale", matrix.scale)

    @property
    def matrix(self) -> QuantizedMatrix:
        return QuantizedMatrix(self.values, self.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves to another device; no conversion changes what was quantized."""
        return super()._apply(partial(keep_precision, fn), recurse)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix.dense(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @property
    def out_features(self) -> int:
        return self.values.shape[0]


def check_quantize(quantize: str, device: torch.device) -> None:
    """Check, before a model is read, that it can be quantized this way.

    Raises:
        UserError: there is no such quantization, or the device cannot compute with it.
    """
    if quantize not in get_args(Quantization):
        raise UserError(f"quantize: '{quantize}' is not one of {', '.join(get_args(Quantization))}")
    if quantize == "fp8" and not _has_fp8(device):
        raise UserError(f"quantize: this {device.type} device cannot compute with fp8; use int8")


def quantize_model(model: Model, quantize: Quantization, as_bytes: bool | None = None) -> Model:
    """The model with quantized matrices; all else is shared with the one given, which stays as it is.

    Args:
        quantize: int8 or fp8 (float8_e4m3fn), each row of a matrix with a scale of its own; full: the model itself.
        as_bytes: whether to store the matrices as bytes. None: on CUDA, whose kernels read them. A CPU would take many
            times as long to convert the bytes as to multiply, so there they are stored as numbers.

    Raises:
        UserError: see `check_quantize`; or a weight is NaN or infinite.
    """
    some = next(model.parameters())
    check_quantize(quantize, some.device)
    if quantize == "full":
        return model
    as_bytes = some.is_cuda if as_bytes is None else as_bytes
    copied = copy.deepcopy(model, {id(part): part for part in [*model.parameters(), *model.buffers()]})
    for name, part in list(copied.named_modules()):
        for norm, linears in _matrices(part):
            for child in linears:
                linear = part.get_submodule(child)
                assert isinstance(linear, nn.Linear), "the matrices are quantized already"
                weight = linear.weight.detach().float()
                if norm is not None:
                    weight = weight * norm.weight.detach().float()
                matrix = QuantizedMatrix.of(weight, quantize, f"{name}.{child}")
                if as_bytes:
                    part.set_submodule(child, QuantizedLinear(matrix, linear.bias))
                    continue
                dense = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
                dense.weight = nn.Parameter(matrix.dense(some.dtype), requires_grad=False)
                dense.bias = linear.bias
                part.set_submodule(child, dense)
            if norm is not None:
                norm.weight = nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)
    return copied


def _matrices(part: nn.Module) -> Iterator[tuple[Any, list[str]]]:
    """A module's own large matrices by their names, and the norm before them, if there is one."""
    if isinstance(part, Block):
        yield part.attention_norm, ["attention.query", "attention.key", "attention.value"]
        yield None, ["attention.output"]
        yield part.feed_forward_norm, ["feed_forward.gate", "feed_forward.up"]
        yield None, ["feed_forward.down"]
    elif isinstance(part, CrossAttention):
        yield part.query_norm, ["query"]
        yield part.key_value_norm, ["key", "value"]
        yield None, ["output"]
    elif isinstance(part, LocalEncoder) and part.cross_attention:
        yield None, ["pooled_to_queries"]
    elif isinstance(part, GlobalTransformer) and not isinstance(part.projection, nn.Identity):
        yield None, ["projection"]
    elif isinstance(part, LocalDecoder):
        yield (None, ["patch_to_keys"]) if part.cross_attention else (part.patch_norm, ["patch_to_bytes"])


def _has_fp8(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 9)
    return device.type == "cpu"
