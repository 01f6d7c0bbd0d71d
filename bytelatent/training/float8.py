"""Products of the global transformer in 8-bit floats, with a scale for each row (torchao).

Weights stay as they are, under the same names: each step rounds them, what they are multiplied with, and the gradients
of the results. Norms, attention, the local models and the hash tables are computed as without it.
"""

import importlib.util
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from bytelatent.errors import UserError
from bytelatent.model import BLTModel

Float8 = Literal["rowwise"]

MULTIPLE = 16  # what both sizes of a matrix must be multiples of
CAPABILITY = (8, 9)  # the first CUDA devices that multiply 8-bit floats


def check_float8(float8: Float8 | None, device: torch.device, dtype: torch.dtype) -> None:
    """Complain early about what cannot be computed so.

    Raises:
        UserError: the device or the dtype does not support it, or torchao is not installed.
    """
    if float8 is None:
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(
            f"float8: {name} does not multiply 8-bit floats (an NVIDIA device of compute capability "
            f"{'.'.join(map(str, CAPABILITY))} or later does, such as L4, H100); leave it out: float8=null"
        )
    if dtype != torch.bfloat16:
        raise UserError("float8: its products give bfloat16; take dtype=bfloat16, or leave it out: float8=null")
    if importlib.util.find_spec("torchao") is None:
        raise UserError("float8 needs torchao: pip install 'bytelatent[fp8]'")


def to_float8(model: nn.Module, float8: Float8 | None) -> None:
    """Let the matrices of a BLT's global transformer be multiplied in 8-bit floats; call `check_float8` before.

    It replaces modules and keeps their weights. So it comes before whatever hooks into modules or compiles them:
    tensor parallelism, activation checkpointing, compilation, FSDP.
    """
    if float8 is None:
        return
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    assert isinstance(model, BLTModel)
    # A batch may have any number of patches; products over them (the gradients of weights) are padded.
    config: Any = replace(Float8LinearConfig.from_recipe_name(float8), pad_inner_dim=True)
    convert_to_float8_training(
        model.global_transformer, config=config, module_filter_fn=lambda part, _: takes_float8(part)
    )


def takes_float8(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) and part.in_features % MULTIPLE == 0 and part.out_features % MULTIPLE == 0
