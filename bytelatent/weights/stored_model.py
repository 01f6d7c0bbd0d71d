"""A model on disk: its configuration, where its tensors are, and what its measurements belong to."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import nn

from bytelatent.config import Settings
from bytelatent.errors import UserError
from bytelatent.model import (
    BLTModel,
    ByteLM,
    LanguageModel,
    ModelSettings,
    TokenLMSettings,
    build_model,
    settings_class,
)
from bytelatent.model.settings import LONGEST_CONTEXT, NAMES
from bytelatent.patching import Calibration, PatchSettings
from bytelatent.text.chat import ChatTemplate
from bytelatent.text.tokenizer import TOKENIZER, Tokenizer, content_digest
from bytelatent.vocab import BYTES, Vocabulary
from bytelatent.weights.safetensors_io import StoredTensor, check_finite, shown

FORMAT = "bytelatent"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their size in bytes

Advance = Callable[[int], None]  # called with the number of bytes of weights after each chunk written


class Origin(Settings):
    """Where a model comes from, for its card.

    Attributes:
        licence: as its repository or its owner states it.
        converted_from: the folder or repository it was converted from.
        trained_from: the folder or repository of the weights that its training began with.
        training_text, validation_text: as named in the settings of its training.
        training_bytes: bytes of text it was trained on.
        bits_per_byte: on the validation text.
    """

    licence: str | None = None
    converted_from: str | None = None
    trained_from: str | None = None
    training_text: list[str] = Field(default=[])
    training_bytes: int | None = None
    validation_text: list[str] = Field(default=[])
    bits_per_byte: float | None = None


class Config(Settings):
    """`config.json` of our format."""

    format: str = FORMAT
    version: Literal[1] = 1
    model: ModelSettings
    context: int = Field(ge=1, le=LONGEST_CONTEXT)  # ids per sequence in training
    patching: PatchSettings | None = None
    calibration: Calibration | None = None
    tokenizer: str | None = None  # of a token LM: the digest of its tokenizer; older ones lack it
    origin: Origin = Origin()

    def check_tokenizer(self, path: Path) -> None:
        """Check that a file is the tokenizer that the model was trained with.

        Raises:
            UserError: it is another.
        """
        if self.tokenizer is not None and content_digest(path) != self.tokenizer:
            raise UserError(
                f"tokenizer: '{path}' is not the one that the model was trained with; give the {TOKENIZER} of its run "
                "or of its first export"
            )

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "") -> Self:
        """Like `Settings.parse`, but the error about a wrong key of the model fits the model's kind."""
        model = values.get("model")
        if isinstance(model, dict):
            kind = settings_class(model)
            values = {**values, "model": kind.parse(model, f"{where}: model" if where else "model")}
        return super().parse(values, where)

    def with_origin(self, **changes: Any) -> "Config":
        return self.model_copy(update={"origin": self.origin.model_copy(update=changes)})


@dataclass(frozen=True)
class StoredModel:
    """A model that was found and checked, and whose weights are not loaded yet.

    Attributes:
        tensors: by our names; empty if only the configuration was read.
        byte_lm: the byte LM stored with a BLT.
        tokenizer: the file of a token LM's tokenizer, if it is there.
        dtype: the precision to load the weights in where none is asked for; None: as stored.
        chat_template: how a conversation is written for it; None where its folder has no template.
        format: the format in words.
        source: where it was found.
        warnings: lines to show to the user.
        folder: the folder of its licence and card; None for a model in memory.
    """

    config: Config
    tensors: Mapping[str, StoredTensor]
    byte_lm: "StoredModel | None"
    format: str
    source: str
    warnings: Sequence[str] = ()
    folder: Path | None = None
    tokenizer: Path | None = None
    dtype: torch.dtype | None = None
    chat_template: ChatTemplate | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: Config,
        byte_lm: ByteLM | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> "StoredModel":
        """Create it from a model in memory."""
        tensors = {name: StoredTensor.of(value) for name, value in model.state_dict().items()}
        inner = None
        if byte_lm is not None:
            inner = StoredModel.of(byte_lm, Config(model=byte_lm.settings, context=config.context))
        return cls(config, tensors, inner, "in memory", "model in memory", chat_template=chat_template)

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> "Pretrained":
        """Load the weights.

        Args:
            dtype: precision of the weights; None: the model's own `dtype`, or as stored, the widest if they differ. The
                byte LM stays as stored.

        Raises:
            UserError: some of the weights are NaN or infinite.
        """
        byte_lm = self.byte_lm._load_alone(device) if self.byte_lm is not None else None
        where = f"{self.source} ({self.format})"
        model = self._load_alone(device, dtype)
        return Pretrained(model, self.config, byte_lm, where, self.warnings, self.tokenizer, self.chat_template)

    def _load_alone(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
        """The model without its byte LM."""
        model = _without_weights(self.config.model)
        dtype = dtype or self.dtype or reduce(torch.promote_types, {tensor.dtype for tensor in self.tensors.values()})
        values = {name: tensor.load().to(device, dtype) for name, tensor in self.tensors.items()}
        for name, value in values.items():
            check_finite(name, value, f"'{self.source}'")  # after the cast, which may overflow
        model.load_state_dict(values, assign=True)
        return model.eval()

    def to_load_in(self, dtype: torch.dtype, source: str) -> "StoredModel":
        """The model under another name, loaded in this precision where none is asked for, with its byte LM."""
        byte_lm = None if self.byte_lm is None else self.byte_lm.to_load_in(dtype, source)
        return replace(self, dtype=dtype, source=source, byte_lm=byte_lm)

    def with_threshold(self, threshold: float | None) -> "StoredModel":
        """The model with another threshold of its patches; None: its own.

        Raises:
            UserError: its patches have none.
        """
        if threshold is None:
            return self
        patching = self.config.patching
        if patching is None or not patching.needs_entropies:
            why = "has no patches" if patching is None else f"has patches by {patching.in_words()}"
            raise UserError(f"threshold: '{self.source}' {why}, which have no threshold; leave it out")
        changed = PatchSettings.parse({**patching.plain(), "threshold": threshold}, "--threshold")
        return replace(self, config=self.config.model_copy(update={"patching": changed, "calibration": None}))

    def in_a_line(self) -> str:
        """Format, sizes, precision, patching and licence in one line."""
        kind, size = NAMES[self.config.model.kind], amount(num_parameters(self.config.model))
        parts = [f"{self.source}: {self.format}", f"{kind} of {size} parameters"]
        if precisions := sorted({str(t.dtype).removeprefix("torch.") for t in self.tensors.values()}):
            parts.append(" and ".join(precisions))
        if self.config.patching is not None:
            parts.append(f"patches by {self.config.patching.in_words()}")
        if self.byte_lm is not None:
            parts.append(f"byte LM of {amount(num_parameters(self.byte_lm.config.model))} parameters")
        elif self.config.patching is not None and self.config.patching.needs_entropies:
            parts.append("no byte LM")
        licence = self.config.origin.licence
        parts.append(f"licence {shown(licence)}" if licence else "licence not stated")
        return ", ".join(parts)

    @property
    def precision(self) -> str:
        """Of its tensors; float32 if they differ."""
        precisions = {str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()}
        return precisions.pop() if len(precisions) == 1 else "float32"

    @property
    def num_bytes(self) -> int:
        """Size of the weights, with those of the byte LM."""
        inner = self.byte_lm.num_bytes if self.byte_lm is not None else 0
        return inner + sum(tensor.num_bytes for tensor in self.tensors.values())


@dataclass
class Pretrained:
    """A loaded model with its configuration, its byte LM, the file of its tokenizer, and its chat template."""

    model: BLTModel | LanguageModel
    config: Config
    byte_lm: ByteLM | None
    source: str  # where it was found, in one line
    warnings: Sequence[str] = ()
    tokenizer: Path | None = None
    chat_template: ChatTemplate | None = None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The ids of the model.

        Raises:
            UserError: a token LM has no tokenizer, or one of more ids than the model.
        """
        model = self.config.model
        if not isinstance(model, TokenLMSettings):
            return BYTES
        if self.tokenizer is None:
            raise UserError(f"{self.source} has no {TOKENIZER}, which a token LM needs; put it there")
        found = Tokenizer.read(self.tokenizer)
        if found.size > model.vocab_size:
            raise UserError(f"'{self.tokenizer}' has {found.size:,} ids, and its model {model.vocab_size:,}")
        return found


@dataclass(frozen=True)
class ModelChecksums:
    """What the measurements in a configuration (its `origin` and `calibration`) belong to.

    Attributes:
        weights, byte_lm: checksums; None if the configuration holds no measurement, or there is no byte LM.
    """

    weights: str | None
    byte_lm: str | None
    patching: PatchSettings | None
    context: int

    @classmethod
    def of(cls, model: nn.Module, config: Config, byte_lm: nn.Module | None) -> "ModelChecksums":
        """Create it from the model as it is now. The weights are read only if there is a measurement."""
        if config.origin == _without_training(config.origin) and config.calibration is None:
            return cls(None, None, config.patching, config.context)
        return cls(checksum(model), checksum(byte_lm) if byte_lm is not None else None, config.patching, config.context)


def drop_outdated(config: Config, before: ModelChecksums, now: ModelChecksums) -> Config:
    """The configuration without the measurements that no longer belong to the model.

    Changed weights were not trained as stated, and other patches, byte LM or context give other bits per byte.
    """
    origin = config.origin
    if now.weights != before.weights:
        origin = _without_training(origin)
    if now != before:
        origin = origin.model_copy(update={"bits_per_byte": None})
    same_patches = (now.byte_lm, now.patching) == (before.byte_lm, before.patching)
    calibration = config.calibration if same_patches else None
    return config.model_copy(update={"origin": origin, "calibration": calibration})


def _without_training(origin: Origin) -> Origin:
    return Origin(licence=origin.licence, converted_from=origin.converted_from, trained_from=origin.trained_from)


def checksum(model: nn.Module) -> str:
    """A digest of a model's weights at memory speed: of the sums of the rows and columns of their bits.

    Unlike `fingerprint`, it changes with the precision of the weights.

    Raises:
        UserError: some weights have no values.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise UserError(f"weights: {name} has no values yet, only a shape (torch's device 'meta'); load them first")
        bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])
        table = bits.reshape(len(bits), -1) if bits.dim() > 1 else bits.reshape(-1, 1)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        for dim in (0, 1):
            digest.update(table.sum(dim, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A short digest of the values of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def shapes(settings: ModelSettings) -> dict[str, torch.Size]:
    """The tensors of a model with these settings and their shapes, in the model's order.

    Raises:
        UserError: the sizes are beyond any computer.
    """
    return dict(_shapes(type(settings), settings.model_dump_json()))


@lru_cache(maxsize=16)  # a model is opened, checked, described, converted: each asks
def _shapes(kind: type[ModelSettings], settings: str) -> dict[str, torch.Size]:
    model = _without_weights(kind.model_validate_json(settings))
    return {name: value.shape for name, value in model.state_dict().items()}


def num_parameters(settings: ModelSettings) -> int:
    return sum(shape.numel() for shape in shapes(settings).values())


def _without_weights(settings: ModelSettings) -> nn.Module:
    try:
        with torch.device("meta"):
            return build_model(settings)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond 64 bits
        raise UserError(f"the settings say sizes that no model has: {shown(str(error))}") from None


def amount(number: int) -> str:
    """1,234 as 1.23 thousand, and so on."""
    for size, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return str(number)
