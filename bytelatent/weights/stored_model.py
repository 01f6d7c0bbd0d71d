"""A model as it lies somewhere: what it is, and where its tensors are, under our names."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from bytelatent.config import Settings
from bytelatent.errors import UserError
from bytelatent.model import BLTModel, BLTSettings, ByteLM, ByteLMSettings, ModelSettings, build
from bytelatent.model.settings import LONGEST_CONTEXT
from bytelatent.patching import Calibration, PatchSettings
from bytelatent.weights.safetensors_io import StoredTensor, check_finite, few, shown

FORMAT = "bytelatent"


class Origin(Settings):
    """Where a model comes from: what its card tells.

    Attributes:
        licence: as its repository or its owner states it.
        converted_from: the folder or repository it was converted from.
        training_text, validation_text: as the settings of its training named them.
        training_bytes: bytes of text it was trained on.
        bits_per_byte: on the validation text.
    """

    licence: str | None = None
    converted_from: str | None = None
    training_text: list[str] = Field(default=[])
    training_bytes: int | None = None
    validation_text: list[str] = Field(default=[])
    bits_per_byte: float | None = None


class Config(Settings):
    """`config.json` of our format."""

    format: str = FORMAT
    version: Literal[1] = 1
    model: ByteLMSettings | BLTSettings
    context: int = Field(ge=1, le=LONGEST_CONTEXT)  # ids that the model saw at once in training
    patching: PatchSettings | None = None
    calibration: Calibration | None = None
    origin: Origin = Origin()

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "") -> Self:
        """As `Settings.parse`; a wrong key of the model is named as one of its own kind."""
        model = values.get("model")
        if isinstance(model, dict):
            is_blt = model.get("kind") == "blt" or (model.get("kind") != "byte_lm" and "encoder" in model)
            kind = BLTSettings if is_blt else ByteLMSettings
            values = {**values, "model": kind.parse(model, f"{where}: model" if where else "model")}
        return super().parse(values, where)


@dataclass(frozen=True)
class StoredModel:
    """A model that is found, checked and not read yet.

    Attributes:
        tensors: by our names; empty where only what the model is was asked for.
        byte_lm: the byte LM that stands with a BLT.
        format: what it is stored as, in words.
        source: where it was found.
        warnings: lines that its user should see.
        folder: where its licence and card are; None for one in memory.
    """

    config: Config
    tensors: Mapping[str, StoredTensor]
    byte_lm: "StoredModel | None"
    format: str
    source: str
    warnings: Sequence[str] = ()
    folder: Path | None = None

    @classmethod
    def of(cls, model: nn.Module, config: Config, byte_lm: ByteLM | None = None) -> "StoredModel":
        """One that is in memory."""
        tensors = {name: StoredTensor.of(value) for name, value in model.state_dict().items()}
        inner = None
        if byte_lm is not None:
            inner = StoredModel.of(byte_lm, Config(model=byte_lm.settings, context=config.context))
        return cls(config, tensors, inner, "in memory", "model in memory")

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> "Pretrained":
        """Read the model.

        Args:
            dtype: precision of its weights; None: as they are stored, or the widest of several, which could not be
                computed with. The byte LM stays as it is stored.

        Raises:
            UserError: some of its weights are NaN or infinite.
        """
        model = _filled(self.config.model, self.tensors, device, dtype, self.source)
        byte_lm = self.byte_lm.load(device).model if self.byte_lm is not None else None
        assert byte_lm is None or isinstance(byte_lm, ByteLM)
        return Pretrained(model, self.config, byte_lm, f"{self.source} ({self.format})", self.warnings)

    def in_a_line(self) -> str:
        """What was found: format, sizes, precision, rule, licence."""
        kind = "byte LM" if isinstance(self.config.model, ByteLMSettings) else "BLT"
        parts = [f"{self.source}: {self.format}", f"{kind} of {_amount(num_parameters(self.config.model))} parameters"]
        if precisions := sorted({str(t.dtype).removeprefix("torch.") for t in self.tensors.values()}):
            parts.append(" and ".join(precisions))
        if self.config.patching is not None:
            parts.append(f"patches by {self.config.patching.in_words()}")
        if self.byte_lm is not None:
            parts.append(f"byte LM of {_amount(num_parameters(self.byte_lm.config.model))} parameters")
        elif self.config.patching is not None and self.config.patching.needs_entropies:
            parts.append("no byte LM")
        licence = self.config.origin.licence
        parts.append(f"licence {shown(licence)}" if licence else "licence not stated")
        return ", ".join(parts)


@dataclass
class Pretrained:
    """A model, and what it needs to be used."""

    model: BLTModel | ByteLM
    config: Config
    byte_lm: ByteLM | None
    source: str  # where it was found, in one line
    warnings: Sequence[str] = field(default_factory=tuple)


def shapes(settings: ModelSettings) -> dict[str, torch.Size]:
    """The tensors of a model of these settings and their shapes, in its own order.

    Raises:
        UserError: no computer could hold it.
    """
    return {name: value.shape for name, value in _empty(settings).state_dict().items()}


def _empty(settings: ModelSettings) -> nn.Module:
    """A model without memory for its weights."""
    try:
        with torch.device("meta"):
            return build(settings)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond 64 bits
        raise UserError(f"the settings say sizes that no model has: {shown(str(error))}") from None


def num_parameters(settings: ModelSettings) -> int:
    return sum(shape.numel() for shape in shapes(settings).values())


def under_our_names(
    tensors: Mapping[str, StoredTensor],
    settings: ModelSettings,
    names_of: Callable[[ModelSettings], Mapping[str, Sequence[str]]],
    where: str,
) -> dict[str, StoredTensor]:
    """The tensors of another format under our names, checked.

    Args:
        tensors: by the other format's names.
        names_of: gives for each of our names those of the tensors that it is made of, in order.
        where: the folder, named in the error.

    Raises:
        UserError: it lists the tensors that are missing, unknown or of another shape.
    """
    is_blt = isinstance(settings, BLTSettings)
    stacks = (settings.encoder, settings.global_transformer, settings.decoder) if is_blt else (settings,)
    num_layers = sum(stack.num_layers for stack in stacks)
    if num_layers > len(tensors):  # before a model of so many is made, if only to list what is missing
        raise UserError(
            f"'{where}': the settings say {num_layers:,} layers, but its weights are {len(tensors):,} tensors; "
            "fetch or write it again"
        )
    names = names_of(settings)
    wanted = [name for parts in names.values() for name in parts]
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    known = set(wanted)
    problems += [f"unknown {name}" for name in tensors if name not in known]
    problems += [f"{n} is {t.dtype}, no floating point" for n, t in tensors.items() if not t.dtype.is_floating_point]
    found = {}
    for ours, shape in shapes(settings).items():
        parts = [tensors[name] for name in names[ours] if name in tensors]
        if len(parts) < len(names[ours]):
            continue
        rows = shape[0] // len(parts)
        wrong = [
            f"{name} is {list(part.shape)} where the settings say {[rows, *shape[1:]]}"
            for name, part in zip(names[ours], parts, strict=True)
            if part.shape != (rows, *shape[1:])
        ]
        problems += wrong
        if not wrong and len({part.dtype for part in parts}) > 1:
            problems.append(f"{names[ours][0]} and those beside it differ in precision")
        elif not wrong:
            found[ours] = parts[0] if len(parts) == 1 else StoredTensor.join(parts)
    if problems:
        raise UserError(f"'{where}': the tensors do not fit the settings: {few(problems, '; ')}")
    return found


def own_names(settings: ModelSettings) -> dict[str, list[str]]:
    """The names of our format, which are those of the model itself."""
    return {name: [name] for name in shapes(settings)}


def check_tensors(stored: StoredModel) -> None:
    """See that a model has the tensors that its settings say, and its byte LM, too.

    Raises:
        UserError: it lists those that are missing, unknown or of another shape.
    """
    settings = stored.config.model
    try:
        under_our_names(stored.tensors, settings, own_names, stored.source)
    except UserError as error:
        has_adapters = any("lora_" in name or ".base_layer." in name for name in stored.tensors)
        hint = "; merge the adapters into the model first, as merge_and_unload of PEFT does" if has_adapters else ""
        raise UserError(f"{error}{hint}") from None
    if stored.byte_lm is not None:
        check_tensors(stored.byte_lm)


def under_their_names(
    tensors: Mapping[str, StoredTensor], names: Mapping[str, Sequence[str]]
) -> dict[str, StoredTensor]:
    """Our tensors under another format's names, cut where one of ours is several of theirs."""
    found = {}
    for ours, theirs in names.items():
        tensor = tensors[ours]
        parts = [tensor] if len(theirs) == 1 else tensor.split(tensor.shape[0] // len(theirs))
        found |= dict(zip(theirs, parts, strict=True))
    return found


def fingerprint(model: nn.Module) -> str:
    """A short digest of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _filled(
    settings: ModelSettings,
    tensors: Mapping[str, StoredTensor],
    device: torch.device | str,
    dtype: torch.dtype | None,
    where: str,
) -> Any:
    model = _empty(settings)
    dtype = dtype or reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})

    def ready(name: str, tensor: StoredTensor) -> Tensor:
        values = tensor.load().to(device, dtype)
        check_finite(name, values, f"'{where}'")  # in this precision: another may have room for less
        return values

    model.load_state_dict({name: ready(name, tensor) for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def _amount(number: int) -> str:
    """1,234 as 1.2 thousand, and so on."""
    for size, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return str(number)
