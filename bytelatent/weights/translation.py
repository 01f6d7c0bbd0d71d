"""Between our models and other formats: tables of tensor names, and the settings that a format cannot hold.

A model that is written in another format and read again is the same to its last setting: `bytelatent.json` next to the
other format's files holds our `config.json`. The other format's own files remain the authority: if they have changed
since, `bytelatent.json` is ignored.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bytelatent.errors import UserError
from bytelatent.model import BLTSettings, ModelSettings
from bytelatent.patching import PatchSettings
from bytelatent.weights.safetensors_io import StoredTensor, listed, read_json, write_json
from bytelatent.weights.stored_model import Config, StoredModel, shapes

SIDECAR = "bytelatent.json"
LAYER = re.compile(r"(.+?)\.(\d+)\.(.+)")

NamesOf = Callable[[ModelSettings], Mapping[str, Sequence[str]]]
Described = tuple[ModelSettings, PatchSettings | None, int]  # all that another format says; the last is the context


@dataclass(frozen=True)
class TensorNames:
    """How another format names our modules.

    Attributes:
        layers: lists of modules.
        in_layer: modules of one entry of such a list.
        others: all other modules. A name with `{table}` means that each hash table is a tensor of its own.
    """

    layers: Mapping[str, str]
    in_layer: Mapping[str, str]
    others: Mapping[str, str]

    def of(self, settings: ModelSettings) -> dict[str, list[str]]:
        """For each of our tensors, the names of the tensors that it consists of in the other format."""
        return {name: self._theirs(name, settings) for name in shapes(settings)}

    def _theirs(self, name: str, settings: ModelSettings) -> list[str]:
        module, _, kind = name.rpartition(".")
        if layer := LAYER.fullmatch(module):
            return [f"{self.layers[layer[1]]}.{layer[2]}.{self.in_layer[layer[3]]}.{kind}"]
        theirs = self.others[module]
        num_tables = 1
        if "{table}" in theirs and isinstance(settings, BLTSettings) and settings.ngram_hash is not None:
            num_tables = settings.ngram_hash.num_tables
        return [f"{theirs.format(table=table)}.{kind}" for table in range(num_tables)]


def own_names(settings: ModelSettings) -> dict[str, list[str]]:
    """The names of our format, which are those of the model itself."""
    return {name: [name] for name in shapes(settings)}


def to_our_names(
    tensors: Mapping[str, StoredTensor], settings: ModelSettings, names_of: NamesOf, where: str
) -> dict[str, StoredTensor]:
    """Rename the tensors of another format, and check that they fit the settings.

    Args:
        tensors: by the other format's names.
        names_of: gives for each of our names the tensors that it consists of, in order.
        where: the folder, for the error.

    Raises:
        UserError: lists the tensors that are missing, unknown or have another shape.
    """
    is_blt = isinstance(settings, BLTSettings)
    stacks = (settings.encoder, settings.global_transformer, settings.decoder) if is_blt else (settings,)
    num_layers = sum(stack.num_layers for stack in stacks)
    if num_layers > len(tensors):  # checked before a model with that many layers is built to list what is missing
        raise UserError(
            f"'{where}': the settings say {num_layers:,} layers, but its weights are {len(tensors):,} tensors; "
            "fetch or write it again"
        )
    names = names_of(settings)
    wanted = [name for parts in names.values() for name in parts]
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    known = set(wanted)
    problems += [f"unknown {name}" for name in tensors if name not in known]
    problems += [f"{n} is {t.dtype}, not floating point" for n, t in tensors.items() if not t.dtype.is_floating_point]
    found = {}
    for ours, shape in shapes(settings).items():
        parts = [tensors[name] for name in names[ours] if name in tensors]
        if len(parts) < len(names[ours]):
            continue
        part_shape = (shape[0] // len(parts), *shape[1:])
        wrong = [
            f"{name} is {list(part.shape)} where the settings say {list(part_shape)}"
            for name, part in zip(names[ours], parts, strict=True)
            if part.shape != part_shape
        ]
        problems += wrong
        if not wrong and len({part.dtype for part in parts}) > 1:
            problems.append(f"{names[ours][0]} and the other tables differ in precision")
        elif not wrong:
            found[ours] = parts[0] if len(parts) == 1 else StoredTensor.join(parts)
    if problems:
        raise UserError(f"'{where}': the tensors do not fit the settings: {listed(problems, '; ')}")
    return found


def to_their_names(tensors: Mapping[str, StoredTensor], names: Mapping[str, Sequence[str]]) -> dict[str, StoredTensor]:
    """Rename our tensors for another format, and split those that are several tensors there."""
    found = {}
    for ours, theirs in names.items():
        tensor = tensors[ours]
        parts = [tensor] if len(theirs) == 1 else tensor.split(tensor.shape[0] // len(theirs))
        found |= dict(zip(theirs, parts, strict=True))
    return found


def check_tensors(stored: StoredModel) -> None:
    """Check that a model, and its byte LM, have the tensors that the settings say.

    Raises:
        UserError: lists the tensors that are missing, unknown or have another shape.
    """
    try:
        to_our_names(stored.tensors, stored.config.model, own_names, stored.source)
    except UserError as error:
        has_adapters = any("lora_" in name or ".base_layer." in name for name in stored.tensors)
        hint = "; merge the adapters into the model first, as merge_and_unload of PEFT does" if has_adapters else ""
        raise UserError(f"{error}{hint}") from None
    if stored.byte_lm is not None:
        check_tensors(stored.byte_lm)


def write_sidecar(folder: Path, config: Config, name: str = SIDECAR) -> None:
    write_json(folder / name, config.shown())


def read_sidecar(folder: Path, found: Config, described: Callable[[Config], Described], name: str = SIDECAR) -> Config:
    """Our own configuration from the sidecar, if it agrees with the other format's files; else `found`.

    Args:
        found: the configuration that the other format's files describe.
        described: what remains of a configuration after writing it in the other format and reading it again.
    """
    if not (folder / name).is_file():
        return found
    own = Config.parse(read_json(folder / name), where=str(folder / name))
    if own.model.kind != found.model.kind or (own.patching is None) != (found.patching is None):
        return found
    try:
        agrees = described(own) == (found.model, found.patching, found.context)
    except UserError:  # the format cannot hold it, so it was written for another model
        agrees = False
    return own if agrees else found
