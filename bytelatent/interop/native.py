"""Our own format: `config.json`, `model.safetensors`, and the byte LM in a folder of its own.

A run is a folder with `settings.yaml` and `checkpoints/`; each checkpoint is in this format, too.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bytelatent.config import Settings
from bytelatent.errors import UserError
from bytelatent.files import newest_whole
from bytelatent.model import BLTModel, BLTSettings, ByteLM, ByteLMSettings
from bytelatent.patching import Calibration, PatchSettings

FORMAT = "bytelatent"


class Config(Settings):
    """`config.json`."""

    format: str = FORMAT
    version: int = 1
    model: ByteLMSettings | BLTSettings
    context: int  # ids that the model saw at once in training
    patching: PatchSettings | None = None
    calibration: Calibration | None = None


@dataclass
class Pretrained:
    """A model, and what it needs to be used."""

    model: BLTModel | ByteLM
    config: Config
    byte_lm: ByteLM | None
    source: str  # where it was found, in one line
    warnings: Sequence[str] = ()


def save(folder: Path, model: nn.Module, config: Config, byte_lm: ByteLM | None = None) -> None:
    """Write a model into an existing folder."""
    (folder / "config.json").write_text(json.dumps(config.plain(), indent=1), encoding="utf-8")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    if byte_lm is not None:
        inner = folder / "byte_lm"
        inner.mkdir()
        save(inner, byte_lm, Config(model=byte_lm.settings, context=config.context))


def is_native(folder: Path) -> bool:
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("format") == FORMAT


def is_run(folder: Path) -> bool:
    return (folder / "settings.yaml").is_file()


def load(folder: Path) -> Pretrained:
    """A model in our format."""
    config = Config.parse(read_json(folder / "config.json"), where=str(folder / "config.json"))
    model_class = ByteLM if isinstance(config.model, ByteLMSettings) else BLTModel
    model = filled(model_class, config.model, read_tensors(folder / "model.safetensors"), str(folder))
    byte_lm = None
    if (folder / "byte_lm").is_dir():
        byte_lm = load(folder / "byte_lm").model
        assert isinstance(byte_lm, ByteLM)
    return Pretrained(model, config, byte_lm, f"{folder} (bytelatent)")


def load_run(folder: Path) -> Pretrained:
    """The model of a run, from its newest whole checkpoint."""
    checkpoint, passed_over = newest_whole(folder / "checkpoints")
    if checkpoint is None:
        detail = f": {'; '.join(passed_over)}" if passed_over else ""
        raise UserError(f"'{folder}' is a run without a whole checkpoint yet{detail}; train it further: blt train")
    found = load(checkpoint)
    if (folder / "byte_lm").is_dir():
        byte_lm = load(folder / "byte_lm").model
        assert isinstance(byte_lm, ByteLM)
        found.byte_lm = byte_lm
    found.source, found.warnings = f"{checkpoint} (checkpoint of a run)", passed_over
    return found


def fingerprint(model: nn.Module) -> str:
    """A short digest of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def filled(model_class: type[Any], settings: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """A model of these settings that holds these tensors.

    Raises:
        UserError: it lists the tensors that are missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model: nn.Module = model_class(settings)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {list(tensors[name].shape)} where the settings say {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise UserError(f"'{where}': the tensors do not fit the settings: {'; '.join(problems)}")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist; the folder is not complete") from None
    except SafetensorError as error:
        raise UserError(f"'{path}' is not a whole safetensors file ({error}); fetch or write it again") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist; the folder is not complete") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds no JSON object; it should be a mapping of keys to values")
    return values
