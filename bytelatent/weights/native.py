"""Our own format: `config.json`, `model.safetensors` (or shards and their index), and the byte LM in `byte_lm/`.

A run is a folder with `settings.yaml` and `checkpoints/`; each of its checkpoints is in this format too.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from bytelatent.config import load_yaml
from bytelatent.credentials import masked
from bytelatent.errors import UserError
from bytelatent.model import ByteLM, ByteLMSettings
from bytelatent.run_folder import newest_checkpoint, read_metrics
from bytelatent.weights.safetensors_io import read_json, read_weights, write_json, write_weights
from bytelatent.weights.stored_model import FORMAT, Advance, Config, Origin, StoredModel, WeightsFormat
from bytelatent.weights.translation import own_names, to_our_names

BYTE_LM = "byte_lm"
LOADING = ("from bytelatent import BLT", "", "model = BLT.from_pretrained(FOLDER)", 'model.generate("The history of")')


def is_native(folder: Path) -> bool:
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("format") == FORMAT


def is_run(folder: Path) -> bool:
    return (folder / "settings.yaml").is_file()


def _read_config(folder: Path) -> StoredModel:
    """A model in our format, or of a run: from its newest complete checkpoint."""
    if is_run(folder):
        return _read_run(folder)
    config = Config.parse(read_json(folder / "config.json"), where=str(folder / "config.json"))
    return StoredModel(config, {}, _byte_lm_in(folder), FORMAT, str(folder))


def _read_tensors(found: StoredModel) -> StoredModel:
    tensors = to_our_names(read_weights(Path(found.source)), found.config.model, own_names, found.source)
    byte_lm = _read_tensors(found.byte_lm) if found.byte_lm is not None else None
    return replace(found, tensors=tensors, byte_lm=byte_lm)


def write_native(folder: Path, stored: StoredModel, advance: Advance = lambda num_bytes: None) -> None:
    write_json(folder / "config.json", stored.config.shown())
    write_weights(folder, stored.tensors, advance=advance)
    if stored.byte_lm is not None:
        (folder / BYTE_LM).mkdir()
        write_native(folder / BYTE_LM, stored.byte_lm, advance)


NATIVE = WeightsFormat(
    title="the format of this package",
    recognizes=lambda folder: is_run(folder) or is_native(folder),
    read_config=_read_config,
    read_tensors=_read_tensors,
    write=write_native,
    modes=None,
    loaded_by="bytelatent",
    loading=LOADING,
)


def save(folder: Path, model: nn.Module, config: Config, byte_lm: ByteLM | None = None) -> None:
    """Write a model in memory into an existing folder, in our format."""
    write_native(folder, StoredModel.of(model, config, byte_lm))


def _byte_lm_in(folder: Path) -> StoredModel | None:
    if not (folder / BYTE_LM).is_dir():
        return None
    found = _read_config(folder / BYTE_LM)
    if not isinstance(found.config.model, ByteLMSettings):
        raise UserError(f"'{folder / BYTE_LM}' should hold a byte LM and holds a BLT; put the byte LM there")
    return found


def _read_run(folder: Path) -> StoredModel:
    checkpoint, corrupt = newest_checkpoint(folder)
    if not is_native(checkpoint):
        raise UserError(
            f"'{checkpoint}' holds the model only in the parts of several processes; write it whole: "
            f"blt export {folder} --out FOLDER"
        )
    found = _read_config(checkpoint)
    return replace(
        found,
        config=found.config.model_copy(update={"origin": origin_of_run(folder, checkpoint)}),
        byte_lm=_byte_lm_in(folder) or found.byte_lm,
        format="checkpoint of a run",
        warnings=corrupt,
    )


def origin_of_run(folder: Path, checkpoint: Path) -> Origin:
    """The training text and the bits per byte of a checkpoint, from the settings and metrics of its run."""
    try:
        data = load_yaml(folder / "settings.yaml").get("data")
        data = data if isinstance(data, dict) else {}
        step = int(checkpoint.name.rpartition("-")[2])
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] <= step]
        measured = next((row for row in reversed(rows) if "validation_bits_per_byte" in row), {})
        return Origin(
            training_text=_paths(data.get("train")),
            training_bytes=rows[-1].get("bytes_seen") if rows else None,
            validation_text=_paths(data.get("valid")),
            bits_per_byte=measured.get("validation_bits_per_byte"),
        )
    except (KeyError, TypeError, AttributeError, ValueError):  # corrupt files; the model does not need them
        return Origin()


def _paths(sources: Any) -> list[str]:
    listed = sources if isinstance(sources, list) else [sources] if sources else []
    return [masked(str(source["path"] if isinstance(source, dict) else source)) for source in listed]
