"""What a configuration says of its model's weights and patches, and whether that is true when they are written."""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings
from bytelatent.weights.stored_model import Config, Origin

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Measured:
    """What the claims of a configuration are about.

    Attributes:
        weights, byte_lm: checksums; None where nothing is claimed, or there is no byte LM.
    """

    weights: str | None
    byte_lm: str | None
    patching: PatchSettings | None
    context: int

    @classmethod
    def of(cls, model: nn.Module, config: Config, byte_lm: nn.Module | None) -> "Measured":
        """The model as it is now. One that nothing is claimed about is not read."""
        if config.origin == _unclaimed(config.origin) and config.calibration is None:
            return cls(None, None, config.patching, config.context)
        return cls(checksum(model), checksum(byte_lm) if byte_lm is not None else None, config.patching, config.context)


def true_of(config: Config, before: Measured, now: Measured) -> Config:
    """The configuration without what was true of the model before, and is not now.

    Other weights were not trained so, or not only; other patches, another byte LM or context give other bits per byte.
    """
    origin = config.origin
    if now.weights != before.weights:
        origin = _unclaimed(origin)
    if now != before:
        origin = origin.model_copy(update={"bits_per_byte": None})
    same_patches = (now.byte_lm, now.patching) == (before.byte_lm, before.patching)
    calibration = config.calibration if same_patches else None
    return config.model_copy(update={"origin": origin, "calibration": calibration})


def checksum(model: nn.Module) -> str:
    """A digest of a model's weights, at the speed of the memory they are in: of the sums of rows and columns of bits.

    In contrast to `fingerprint`, it is none of the values: another precision of the same weights has another.

    Raises:
        UserError: some have no values.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise UserError(f"weights: {name} has no values yet, only a shape (torch's device 'meta'); load them first")
        bits = tensor.detach().contiguous().view(BITS[tensor.element_size()])
        table = bits.reshape(len(bits), -1) if bits.dim() > 1 else bits.reshape(-1, 1)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        for dim in (0, 1):
            digest.update(table.sum(dim, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def _unclaimed(origin: Origin) -> Origin:
    """What is left of it where nothing is known of training and measuring."""
    return Origin(licence=origin.licence, converted_from=origin.converted_from)
