"""Which matrices of the global transformer are multiplied in 8-bit floats: those that gain by it.

A product of R rows with a matrix N x K costs 2 * R * N * K operations, and training has three of them (four where the
forward pass is computed again). In 8-bit floats they run `SPEEDUP` times as fast, but what is multiplied must be read
for its scales, read again and written, in two layouts; that grows with R * (N + K). So wide matrices gain, and narrow
ones lose, whatever the batch; and with few rows rounding the matrix itself costs too much.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bytelatent.data import DataSettings
from bytelatent.errors import UserError
from bytelatent.model import BLTModel, ModelSettings, build_model
from bytelatent.training.distributed.settings import Float8, ParallelSettings

PATCH_BYTES = 4.5  # the mean patch where no setting names one
MULTIPLE = 16  # what both sizes of a matrix must be multiples of
# Fitted to `rowwise` of torchao on H200s, all matrices taken: whole steps of the 1B shape took 42 to 44 ms more than in
# bfloat16, of the 8B shape with 65,536 bytes a GPU 94 ms less. For the 8B shape with 16,384 this gives 25 ms more; 16
# were measured. The other recipes are taken to round at the same rate, which nobody has measured.
SPEEDUP = 1.84  # of products
BALANCE = 530.0  # operations in bfloat16 in the time that rounding takes for a byte


@dataclass(frozen=True)
class Traffic:
    """What a recipe reads and writes, in bytes for each value, and how many products it computes in 8-bit floats.

    A scale of a row takes a pass that reads 2 bytes and one that reads 2 and writes 1. Where both layouts have the same
    scale they share the first, and the second writes both.
    """

    forward: int  # an input and a weight, once more where the forward pass is computed again
    inputs: int  # for the backward pass
    weights: int
    gradients: int
    products: int  # of the forward pass and the two of the backward pass


TRAFFIC: dict[Float8, Traffic] = {
    "rowwise": Traffic(5, 5, 5, 10, 3),
    "rowwise_with_gw_hp": Traffic(5, 0, 5, 5, 2),
    "tensorwise": Traffic(5, 1, 1, 6, 3),
}


def expected_patches(data: DataSettings, patch_bytes: float | None) -> float:
    """Patches of a batch, as far as they are known before there is one: all slots are computed.

    Args:
        patch_bytes: the mean patch that is calibrated for.
    """
    return data.patch_slots or data.batch_bytes / (patch_bytes or PATCH_BYTES)


def gains(float8: Float8, rows: float, out: int, width: int, recomputed: bool = False) -> bool:
    """Whether a matrix [out, width] is faster in 8-bit floats.

    Args:
        rows: patches of a batch.
        recomputed: whether the backward pass computes the product of the forward pass again.
    """
    traffic, passes = TRAFFIC[float8], 2 if recomputed else 1
    of_inputs, of_weights = (passes * traffic.forward + more for more in (traffic.inputs, traffic.weights))
    moved = of_inputs * rows * width + of_weights * out * width + traffic.gradients * rows * out
    products = traffic.products + recomputed
    return products * 2 * rows * out * width * (1 - 1 / SPEEDUP) > BALANCE * moved


def float8_matrices(
    model: BLTModel, float8: Float8, rows: float | None, parallel: ParallelSettings | None = None
) -> set[str]:
    """Names, within the global transformer, of the linear layers that are computed in 8-bit floats.

    Args:
        rows: patches of a batch; None: all layers whose sizes fit, also those that are slower.
        parallel: tensor parallelism leaves each rank a part of a matrix.
    """
    parallel = parallel or ParallelSettings()
    found = set()
    for name, part in model.global_transformer.named_modules():
        if not isinstance(part, nn.Linear) or any(size % MULTIPLE for size in part.weight.shape):
            continue
        out, width = part.weight.shape
        if name.endswith((".output", ".down")):
            width //= parallel.tensor
        else:
            out //= parallel.tensor
        # selective checkpointing saves what products give
        if rows is None or gains(float8, rows, out, width, parallel.activation_checkpointing == "full"):
            found.add(name)
    return found


def check_gain(settings: ModelSettings, float8: Float8, rows: float, parallel: ParallelSettings) -> None:
    """Check that something becomes faster.

    Raises:
        UserError: nothing does.
    """
    with torch.device("meta"):
        model = build_model(settings)
    assert isinstance(model, BLTModel)
    if not float8_matrices(model, float8, rows, parallel):
        widest = model.settings.global_transformer
        raise UserError(
            f"float8: {float8} makes no product of {rows:,.0f} patches with matrices of {widest.dim} x "
            f"{widest.hidden_dim} faster, as rounding costs more than it saves; take a wider model, a larger "
            "data.batch_bytes, or leave it out: float8=null"
        )


def to_float8(
    model: nn.Module, float8: Float8 | None, rows: float | None = None, parallel: ParallelSettings | None = None
) -> None:
    """Let matrices of a BLT's global transformer be multiplied in 8-bit floats; call `check_float8` before.

    Weights stay as they are, under the same names: each step rounds them, what they are multiplied with, and the
    gradients of the results. The rest of the model is computed as without it.

    It replaces modules and keeps their weights. So it comes before whatever hooks into modules or compiles them. The
    other arguments are those of `float8_matrices`.
    """
    if float8 is None:
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # pyright: ignore[reportMissingImports]

    assert isinstance(model, BLTModel)
    # A batch may have any number of patches; products over them (the gradients of weights) are padded.
    config: Any = replace(Float8LinearConfig.from_recipe_name(float8), pad_inner_dim=True)
    taken = float8_matrices(model, float8, rows, parallel)
    convert_to_float8_training(
        model.global_transformer, config=config, module_filter_fn=lambda _part, name: name in taken
    )
