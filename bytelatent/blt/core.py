"""What a `BLT` is made of: the network, its entropy model, its settings; loading, moving and saving them."""

import logging
import reprlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from bytelatent.config import removed_arguments, removed_attribute, renamed_arguments, renamed_attribute
from bytelatent.data import Patcher
from bytelatent.device import choose_device, keep_precision, precision_of_weights
from bytelatent.errors import UserError
from bytelatent.inference import Engine
from bytelatent.inference.quantize import QuantizedLinear, check_quantize, quantize_model
from bytelatent.inference.scoring import entropies_of
from bytelatent.inference.settings import REMOVED, KVCacheNumbers, Quantization, check_kv_cache, check_limits
from bytelatent.model import BLTModel, BLTSettings, ByteLM, build_model, preset
from bytelatent.model.settings import NAMES, StackSettings
from bytelatent.patching import PatchSettings
from bytelatent.text.chat import ChatTemplate
from bytelatent.weights import (
    Config,
    ModelChecksums,
    StoredModel,
    check_target,
    drop_outdated,
    load_byte_lm,
    open_pretrained,
    write_model,
)
from bytelatent.weights.safetensors_io import check_finite
from bytelatent.weights.stored_model import amount

LOGGER = logging.getLogger(__name__)

CONTEXT = 8192  # ids, of a model that is made from its shape alone
OLD_NAMES = {"byte_lm", "weights", *REMOVED}


class Core(nn.Module):
    """The parts of a `BLT`, which documents them."""

    @removed_arguments(**REMOVED)
    @renamed_arguments(byte_lm="entropy_model", weights="quantize")
    def __init__(
        self,
        model: BLTModel,
        config: Config,
        entropy_model: ByteLM | None,
        source: str = "",
        quantize: Quantization = "full",
        chat_template: ChatTemplate | str | None = None,
        kv_cache: KVCacheNumbers = "full",
    ):
        super().__init__()
        self._quantize: Quantization = quantize
        self._idle_engine: tuple[Any, Engine] | None = None
        self._modules["model"] = quantize_model(model, quantize).eval()
        self.entropy_model = entropy_model
        self._config = config
        self._measured = ModelChecksums.of(self.model, config, self.entropy_model)
        self.chat_template = chat_template
        self.kv_cache = kv_cache
        self.source = source
        self.eval()

    @classmethod
    @removed_arguments(**REMOVED)
    @renamed_arguments(entropy="entropy_model", weights="quantize")
    def from_pretrained(
        cls,
        source: str | Path,
        entropy_model: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        quantize: Quantization = "full",
        patching: PatchSettings | None = None,
        kv_cache: KVCacheNumbers = "full",
    ) -> Self:
        """Load a model, in evaluation mode, and log in one line what was found.

        Args:
            source: a run; a folder, or OWNER/NAME on the Hugging Face hub, in our format, Meta's or transformers'; or
                `tiny`, the model in the package.
            entropy_model: where the byte LM is, if it is neither in `source` nor next to it.
            device: `cpu`, `cuda`, `cuda:1`, `mps`, `auto`, or a torch.device.
            dtype: precision of the weights: `float32`, `bfloat16`, `auto` (as stored), or a torch.dtype. The entropy
                model keeps float32, for exact patches.
            revision: a branch, a tag or a commit of the repository.
            token: a user's key for the hub; default: HF_TOKEN, or the key of `hf auth login`.
            local_files_only: use earlier downloads, and do not connect to the hub.
            quantize: `int8` or `fp8` quantizes the large matrices: less memory, and faster generation on a GPU.
            patching: patching settings in place of the model's own, such as another threshold.
            kv_cache: `int8` generates with KV caches in 8 bits: about half of bfloat16's memory.

        Raises:
            UserError: there is no BLT at `source`, it is incomplete or not supported, or cannot be quantized this way.
        """
        precision, device = precision_of_weights(dtype), choose_device(device)
        check_quantize(quantize, device)
        check_kv_cache(kv_cache)
        found = open_pretrained(source, entropy_model, revision, token, local_files_only)
        if not isinstance(found.config.model, BLTSettings):
            name = NAMES[found.config.model.kind]
            raise UserError(
                f"model: '{source}' holds a {name}, which has no patches; name a BLT, or load it with "
                "bytelatent.weights.load"
            )
        if found.config.patching is None:
            raise UserError(f"model: '{source}' has no patching settings; its config.json should have them")
        LOGGER.info(found.in_a_line())
        for line in found.warnings:
            LOGGER.warning(line)
        loaded = found.load(device, precision)
        assert isinstance(loaded.model, BLTModel)
        lm = loaded.byte_lm.to(torch.float32) if loaded.byte_lm is not None else None
        blt = cls(loaded.model, loaded.config, lm, loaded.source, quantize, loaded.chat_template, kv_cache)
        blt.patching = blt.patching if patching is None else patching
        return blt

    @classmethod
    def from_config(
        cls,
        config: str | BLTSettings | Config,
        patching: PatchSettings | None = None,
        entropy_model: ByteLM | str | Path | None = None,
        context: int | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
    ) -> Self:
        """Make a model with random weights; `torch.manual_seed` determines them.

        Args:
            config: a preset's name, such as `demo-blt`; settings of a BLT; or a whole Config, as `blt.config`.
            patching: patching settings in place of the config's; a preset has none, and takes mode `space`.
            entropy_model: a byte LM, or where one is, for patches by entropy.
            context: ids that are read at once in training, in place of the config's; 8192 of a preset.
            device, dtype: as in `from_pretrained`; `auto` is float32.

        Raises:
            UserError: there is no such preset, it is no BLT, or its patching settings need an entropy model.
        """
        precision, device = precision_of_weights(dtype) or torch.float32, choose_device(device)
        settings = preset(config) if isinstance(config, str) else config
        if not isinstance(settings, Config):
            if not isinstance(settings, BLTSettings):
                shown = f"'{config}' is a {NAMES[settings.kind]}" if hasattr(settings, "kind") else reprlib.repr(config)
                raise UserError(f"config: {shown}; name a preset of a BLT, such as demo-blt, or give its settings")
            settings = Config(model=settings, context=CONTEXT, patching=PatchSettings(mode="space"))
        changes = {"patching": patching, "context": None if context is None else checked_context(context)}
        settings = settings.model_copy(update={name: value for name, value in changes.items() if value is not None})
        if not isinstance(settings.model, BLTSettings) or settings.patching is None:
            raise UserError("config: it takes the config of a BLT, with patching settings")
        check_type(PatchSettings, "patching", settings.patching)
        if entropy_model is not None and not isinstance(entropy_model, ByteLM):
            entropy_model = load_byte_lm(entropy_model, device, torch.float32, "entropy_model")
        if settings.patching.needs_entropies and entropy_model is None:
            raise UserError(f"entropy_model: patches by {settings.patching.in_words()} need one; name a byte LM")
        with torch.device(device):
            model = build_model(settings.model).to(precision)
        return cls(cast(BLTModel, model), settings, entropy_model.to(device) if entropy_model is not None else None)

    byte_lm = renamed_attribute("byte_lm", "entropy_model")
    ahead = removed_attribute("ahead", REMOVED["ahead"])
    draft_length = removed_attribute("draft_length", REMOVED["draft_length"])
    weights = renamed_attribute("weights", "quantize")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # torch's would register a module without the property's checks
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in OLD_NAMES]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_idle_engine": None}  # for copies and pickles

    def __repr__(self) -> str:
        encoder, middle, decoder = self.model.encoder, self.model.global_transformer, self.model.decoder
        quantized = "" if self.quantize == "full" else f", quantized to {self.quantize}"
        lines = [
            f"model: {amount(_num_parameters(self.model))} parameters, {_name(self.dtype)} on {self.device}{quantized}",
            *(
                f"  {name}: {amount(_num_parameters(part))}, {_in_words(part.stack.settings)}"
                for name, part in (("encoder", encoder), ("global_transformer", middle), ("decoder", decoder))
            ),
        ]
        if encoder.ngram_hash is not None:
            lines[1] += f", n-gram tables of {amount(_num_parameters(encoder.ngram_hash))}"
        if (lm := self.entropy_model) is not None:
            size, its_dtype = amount(_num_parameters(lm)), _name(lm.embedding.weight.dtype)
            lines.append(f"entropy_model: {size} parameters, {its_dtype}, frozen, {_in_words(lm.settings)}")
        lines += [f"patching: {self.patching.in_words()}", f"context: {self.context:,} ids"]
        return "\n".join([f"{type(self).__name__}(", *(f"  {line}" for line in lines), ")"])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network's weights."""
        return next(self.model.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Of the network and the entropy model; `only_trainable` leaves out what is frozen, as the entropy model is."""
        if only_trainable:
            return sum(weight.numel() for weight in self.parameters() if weight.requires_grad)
        return _num_parameters(self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *found: list[str]
    ) -> None:
        """As torch's, which takes weights of an entropy model that is None for expected."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *found)
        if self.entropy_model is None and strict:
            _, unexpected, _ = found
            unexpected += [name for name in state_dict if name.startswith(f"{prefix}entropy_model.")]

    def train(self, mode: bool = True) -> Self:
        """As torch's; the entropy model stays in evaluation mode."""
        super().train(mode)
        if self.entropy_model is not None:
            self.entropy_model.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As torch's, of the network; the entropy model stays frozen."""
        self.model.requires_grad_(requires_grad)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda`, `bfloat16` and others call: the entropy model moves along, and keeps its precision.

        Another precision of it gives other patches; `blt.entropy_model.to(torch.bfloat16)` asks for that.
        """
        self._idle_engine = None
        if recurse:
            for part in self.children():
                part._apply(partial(keep_precision, fn) if part is self.entropy_model else fn)
        return super()._apply(fn, recurse=False)

    @property
    def quantize(self) -> Quantization:
        return self._quantize

    @property
    def config(self) -> Config:
        return self._config

    @config.setter
    def config(self, config: Config) -> None:
        check_type(Config, "config", config)
        if config.patching is None:
            raise UserError("config: it has no patching settings, which a BLT needs; set config.patching")
        if config.model != self.model.settings:
            raise UserError("config: its `model` has other shapes than the model; change the model with it")
        is_new = (config.origin, config.calibration) != (self._config.origin, self._config.calibration)
        self._config = config
        if is_new:  # new measurements belong to the model as it is now
            self._measured = ModelChecksums.of(self.model, config, self.entropy_model)

    @property
    def model(self) -> BLTModel:
        return cast(BLTModel, self._modules["model"])

    @model.setter
    def model(self, model: BLTModel) -> None:
        check_type(BLTModel, "model", model)
        self._modules["model"] = model.train(self.training)
        self._config = self._config.model_copy(update={"model": model.settings})

    @property
    def entropy_model(self) -> ByteLM | None:
        return cast(ByteLM | None, self._modules["entropy_model"])

    @entropy_model.setter
    def entropy_model(self, entropy_model: ByteLM | None) -> None:
        if entropy_model is not None:
            check_type(ByteLM, "entropy_model", entropy_model)
            entropy_model.eval().requires_grad_(False)
        self._modules["entropy_model"] = entropy_model

    @property
    def patching(self) -> PatchSettings:
        assert self._config.patching is not None
        return self._config.patching

    @patching.setter
    def patching(self, patching: PatchSettings) -> None:
        check_type(PatchSettings, "patching", patching)
        self._config = self._config.model_copy(update={"patching": patching})

    @property
    def context(self) -> int:
        return self._config.context

    @context.setter
    def context(self, context: int) -> None:
        self._config = self._config.model_copy(update={"context": checked_context(context)})

    @property
    def kv_cache(self) -> KVCacheNumbers:
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, kv_cache: KVCacheNumbers) -> None:
        check_kv_cache(kv_cache)
        self._kv_cache: KVCacheNumbers = kv_cache

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self._chat_template

    @chat_template.setter
    def chat_template(self, chat_template: ChatTemplate | str | None) -> None:
        """A str is Jinja."""
        found = ChatTemplate(chat_template) if isinstance(chat_template, str) else chat_template
        if found is not None:
            check_type(ChatTemplate, "chat_template", found)
        self._chat_template = found

    @property
    def patcher(self) -> Patcher:
        byte_lm = self.needed_entropy_model()
        return Patcher(self.patching, byte_lm, entropies_of=partial(entropies_of, byte_lm) if byte_lm else None)

    def needed_entropy_model(self) -> ByteLM | None:
        """The entropy model, where the patching mode needs one.

        Raises:
            UserError: it does, and there is no entropy model.
        """
        if not self.patching.needs_entropies:
            return None
        if self.entropy_model is None:
            way_out = "name it: BLT.from_pretrained(..., entropy_model=FOLDER)"
            raise UserError(f"this model's patches need its entropy model; {way_out}")
        return self.entropy_model

    def save_pretrained(self, folder: str | Path, format: str = "native", licence: str | None = None) -> None:
        """Write the model, its entropy model, settings and card into a folder, which appears complete or not at all.

        If weights or patches have changed, the card states no results of training and measuring.

        Args:
            format: `native`; `hf` loads in transformers' `BltForCausalLM` and `AutoTokenizer`; `meta` is Meta's hub
                format, with the byte LM in `blt-entropy/`.
            licence: the licence on the card; None: the one that the model came with.

        Raises:
            UserError: the folder holds something else than a saved model, the format cannot express a setting, the
                weights are quantized, hold NaN or infinite values, or do not fit the settings, as with adapters. The
                folder stays as it was.
        """
        if self.quantize != "full":
            found = f"weights quantized to {self.quantize}"
            raise UserError(f"save_pretrained: no format holds {found}; load without quantize=")
        target = check_target(Path(folder), format, licence)
        now = ModelChecksums.of(self.model, self.config, self.entropy_model)
        for where, part in (("weights", self.model), ("entropy_model", self.entropy_model)):
            for name, value in part.state_dict().items() if part is not None else ():
                if not value.is_meta:  # `write_model` names what has no values
                    check_finite(name, value, where)
        config = drop_outdated(self.config, self._measured, now)
        stored = StoredModel.of(self.model, config, self.entropy_model, self.chat_template)
        write_model(stored, target, format, licence)


def _num_parameters(module: nn.Module) -> int:
    quantized = [part.values.numel() for part in module.modules() if isinstance(part, QuantizedLinear)]
    return sum(weight.numel() for weight in module.parameters()) + sum(quantized)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_words(stack: StackSettings) -> str:
    layers = f"{stack.num_layers} layer{'' if stack.num_layers == 1 else 's'} of width {stack.dim:,}"
    return layers if stack.window is None else f"{layers}, window {stack.window:,}"


def check_type(kind: type, name: str, value: object) -> None:
    if not isinstance(value, kind):
        raise UserError(f"{name}: it takes a {kind.__name__}, not {type(value).__name__}: {reprlib.repr(value)}")


def checked_context(context: Any) -> int:
    check_limits(context=context)
    return int(context)
