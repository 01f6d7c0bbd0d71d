"""Our own format, and the base of the others, which are translated to its names and settings and back.

Ours is `config.json`, `model.safetensors` (or shards and their index), and the byte LM in `byte_lm/`. A run is a folder
with `settings.yaml` and `checkpoints/`; each of its checkpoints is in this format too.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from bytelatent.config import load_yaml
from bytelatent.credentials import masked
from bytelatent.errors import UserError
from bytelatent.model import BLTSettings, ByteLM, ByteLMSettings, ModelSettings
from bytelatent.run_folder import newest_checkpoint, read_metrics
from bytelatent.text.tokenizer import TOKENIZER
from bytelatent.weights.safetensors_io import (
    SHARD_BYTES,
    StoredTensor,
    listed,
    read_json_object,
    read_weights,
    shown,
    write_json_object,
    write_weights,
)
from bytelatent.weights.stored_model import FORMAT, Advance, Config, Origin, StoredModel, shapes

BYTE_LM = "byte_lm"
LOADING_LM = ("from bytelatent.weights import load", "", "found = load(FOLDER)  # found.model, found.vocabulary")
LOADING = ("from bytelatent import BLT", "", "model = BLT.from_pretrained(FOLDER)", 'model.generate("The history of")')

BLOCK_OPTIONS = ("head_size", "attention_bias", "qk_norm", "rope_scaling")
SettingsTable = Mapping[str, Sequence[str]]  # keys of another format, and those of our settings that have its value

# Our modules, and their names in Meta's formats and in transformers. {table} means that each hash table is a tensor of
# its own.
META_NAMES, TRANSFORMERS_NAMES = 0, 1  # columns
MODULES = {
    "encoder.embedding": ("local_encoder.tok_embeddings", "model.local_encoder.embed_tokens"),
    "encoder.ngram_hash.tables": ("encoder_hash_tok_embedding.{table}", "model.encoder_hash_tok_embedding"),
    "encoder.pooled_to_queries": (
        "local_encoder.patch_embedding_projection",
        "model.local_encoder.patch_embedding_projection",
    ),
    "encoder.stack.blocks": ("local_encoder.layers", "model.local_encoder.layers"),
    "encoder.cross_attention": ("local_encoder.cross_attn_layers", "model.local_encoder.cross_attn_layers"),
    "global_transformer.projection": (
        "global_transformer.token_embedding_projection",
        "model.global_transformer.token_embedding_projection",
    ),
    "global_transformer.stack.blocks": ("global_transformer.layers", "model.global_transformer.layers"),
    "decoder.patch_to_keys": (
        "local_decoder.patch_embedding_projection",
        "model.local_decoder.patch_embedding_projection",
    ),
    "decoder.stack.blocks": ("local_decoder.layers", "model.local_decoder.layers"),
    "decoder.cross_attention": ("local_decoder.cross_attn_layers", "model.local_decoder.cross_attn_layers"),
    "decoder.norm": ("local_decoder.norm", "model.local_decoder.norm"),
    "decoder.output": ("local_decoder.output", "lm_head"),
    # the byte LM
    "embedding": ("tok_embeddings", "model.patcher.embed_tokens"),
    "stack.blocks": ("layers", "model.patcher.layers"),
    "norm": ("norm", "model.patcher.norm"),
    "output": ("output", "model.patcher.lm_head"),
}
IN_LAYER = {
    "attention_norm": ("attention_norm", "input_layernorm"),
    "attention.query": ("attention.wq", "self_attn.q_proj"),
    "attention.key": ("attention.wk", "self_attn.k_proj"),
    "attention.value": ("attention.wv", "self_attn.v_proj"),
    "attention.output": ("attention.wo", "self_attn.o_proj"),
    "attention.query_norm": ("attention.q_norm", "self_attn.q_norm"),  # of Llama-like models; Meta's have none
    "attention.key_norm": ("attention.k_norm", "self_attn.k_norm"),
    "feed_forward_norm": ("ffn_norm", "post_attention_layernorm"),
    "feed_forward.gate": ("feed_forward.w1", "mlp.gate_proj"),
    "feed_forward.down": ("feed_forward.w2", "mlp.down_proj"),
    "feed_forward.up": ("feed_forward.w3", "mlp.up_proj"),
    # a cross-attention
    "query_norm": ("cross_attn_norm_q", "q_norm"),
    "key_value_norm": ("cross_attn_norm_kv", "k_norm"),
    "query": ("wq", "q_proj"),
    "key": ("wk", "k_proj"),
    "value": ("wv", "v_proj"),
    "output": ("wo", "o_proj"),
}
LAYER = re.compile(r"(.+?)\.(\d+)\.(.+)")


class WeightsFormat:
    """A format of weights: how to recognize, read and write it.

    Attributes:
        modes: the patching modes that the format can express; None: all.
        block_options: of `BLOCK_OPTIONS`, those that the format can express in a BLT or a byte LM.
        column: of the names in `MODULES` and `IN_LAYER`; None: our own names.
        loaded_by: the Python package that loads it, for the hub.
        loading: lines of Python that load it; FOLDER stands for the folder.
        byte_lm_folder: where the byte LM of a BLT is; None: in the same files.
        shard_bytes: largest size of a file of weights; None: all weights are in one file.
    """

    modes: ClassVar[tuple[str, ...] | None] = None
    block_options: ClassVar[tuple[str, ...]] = ()
    column: ClassVar[int | None] = None
    loaded_by: ClassVar[str] = "bytelatent"
    loading: ClassVar[tuple[str, ...]] = LOADING
    byte_lm_folder: ClassVar[str | None] = None
    shard_bytes: ClassVar[int | None] = SHARD_BYTES

    def recognizes(self, folder: Path) -> bool:
        """Whether a folder holds a model in this format."""
        raise NotImplementedError

    def read_config(self, folder: Path) -> StoredModel:
        """The model without its tensors.

        Raises:
            UserError: a file or a key is missing, or requires a computation that is not implemented.
        """
        raise NotImplementedError

    def write_config(self, folder: Path, stored: StoredModel) -> None:
        """Write all files but the weights.

        Raises:
            UserError: the format cannot express one of the model's settings.
        """
        raise NotImplementedError

    def names(self, settings: ModelSettings) -> dict[str, list[str]]:
        """For each of our tensors, the tensors of this format that it consists of."""
        if self.column is None:
            return {name: [name] for name in shapes(settings)}
        hashes = settings.ngram_hash if isinstance(settings, BLTSettings) else None
        tables = range(hashes.num_tables if hashes is not None else 0)
        theirs = {name: self._their_name(name) for name in shapes(settings)}
        return {ours: [n.format(table=t) for t in tables] if "{table}" in n else [n] for ours, n in theirs.items()}

    def _their_name(self, name: str) -> str:
        assert self.column is not None
        module, _, kind = name.rpartition(".")
        if layer := LAYER.fullmatch(module):
            return f"{MODULES[layer[1]][self.column]}.{layer[2]}.{IN_LAYER[layer[3]][self.column]}.{kind}"
        return f"{MODULES[module][self.column]}.{kind}"

    def read_weights(self, folder: Path) -> dict[str, StoredTensor]:
        return read_weights(folder)

    def open(self, folder: Path, weights: bool = True) -> StoredModel:
        """A model in this format, whose weights stay on the disk; `weights=False` reads only its configuration."""
        found = self.read_config(folder)
        return self.read_tensors(found) if weights else found

    def read_tensors(self, found: StoredModel) -> StoredModel:
        stored = self.with_tensors(found, self.read_weights(Path(found.source)))
        return replace(stored, byte_lm=self.read_tensors(found.byte_lm) if found.byte_lm is not None else None)

    def with_tensors(self, found: StoredModel, tensors: Mapping[str, StoredTensor]) -> StoredModel:
        """A model with tensors of this format, renamed and joined.

        Raises:
            UserError: lists the tensors that are missing, unknown or have another shape.
        """
        settings = found.config.model
        is_blt = isinstance(settings, BLTSettings)
        stacks = (settings.encoder, settings.global_transformer, settings.decoder) if is_blt else (settings,)
        num_layers = sum(stack.num_layers for stack in stacks)
        if num_layers > len(tensors):  # checked before a model with that many layers is built to list what is missing
            raise UserError(
                f"'{found.source}': the settings say {num_layers:,} layers, but its weights are {len(tensors):,} "
                "tensors; fetch or write it again"
            )
        names = self.names(settings)
        wanted = dict.fromkeys(name for parts in names.values() for name in parts)
        problems = [f"missing {name}" for name in wanted if name not in tensors]
        problems += [f"unknown {name}" for name in tensors if name not in wanted]
        integers = {name: tensor.dtype for name, tensor in tensors.items() if not tensor.dtype.is_floating_point}
        problems += [f"{name} is {dtype}, not floating point" for name, dtype in integers.items()]
        fitting = {}
        for name, shape in shapes(settings).items():
            parts = {part: tensors[part] for part in names[name] if part in tensors}
            expected = (shape[0] // len(names[name]), *shape[1:])
            wrong = {part: tensor for part, tensor in parts.items() if tensor.shape != expected}
            if len(parts) < len(names[name]):
                continue
            problems += [f"{n} is {list(t.shape)} where the settings say {list(expected)}" for n, t in wrong.items()]
            if not wrong and len({part.dtype for part in parts.values()}) > 1:
                problems.append(f"{names[name][0]} and the other tables differ in precision")
            elif not wrong:
                fitting[name] = StoredTensor.join(list(parts.values()))
        if problems:
            raise UserError(f"'{found.source}': the tensors do not fit the settings: {listed(problems, '; ')}")
        return replace(found, tensors=fitting)

    def stored_tensors(self, stored: StoredModel) -> Mapping[str, StoredTensor]:
        """The tensors of a model by this format's names; those that are several tensors there are split."""
        tensors = {}
        for ours, theirs in self.names(stored.config.model).items():
            tensor = stored.tensors[ours]
            parts = [tensor] if len(theirs) == 1 else tensor.split(tensor.shape[0] // len(theirs))
            tensors |= dict(zip(theirs, parts, strict=True))
        return tensors

    def write(self, folder: Path, stored: StoredModel, advance: Advance = lambda num_bytes: None) -> None:
        """Write a model into an existing folder.

        Args:
            advance: called with the number of bytes after each chunk of weights.

        Raises:
            UserError: the format cannot express one of the model's settings.
        """
        self.write_config(folder, stored)
        if stored.tokenizer is not None:
            shutil.copyfile(stored.tokenizer, folder / TOKENIZER)
        write_weights(folder, self.stored_tensors(stored), self.shard_bytes, advance)
        if stored.byte_lm is not None and self.byte_lm_folder is not None:
            (folder / self.byte_lm_folder).mkdir()
            self.write(folder / self.byte_lm_folder, stored.byte_lm, advance)


class NativeFormat(WeightsFormat):
    byte_lm_folder = BYTE_LM

    def recognizes(self, folder: Path) -> bool:
        return is_run(folder) or _is_native(folder)

    def stored_tensors(self, stored: StoredModel) -> Mapping[str, StoredTensor]:
        return stored.tensors

    def read_config(self, folder: Path) -> StoredModel:
        """A model in our format, or of a run: from its newest complete checkpoint."""
        if is_run(folder):
            return self._read_run(folder)
        values = read_json_object(folder / "config.json")
        if "model_type" in values:  # written by `bytelatent.hf`: the other keys are for transformers
            values = {name: value for name, value in values.items() if name in Config.model_fields}
        config = Config.parse(values, where=str(folder / "config.json"))
        return StoredModel(config, {}, self._byte_lm_in(folder), FORMAT, str(folder))

    def write_config(self, folder: Path, stored: StoredModel) -> None:
        write_json_object(folder / "config.json", stored.config.shown())

    def _byte_lm_in(self, folder: Path) -> StoredModel | None:
        if not (folder / BYTE_LM).is_dir():
            return None
        found = self.read_config(folder / BYTE_LM)
        if not isinstance(found.config.model, ByteLMSettings):
            raise UserError(f"'{folder / BYTE_LM}' should hold a byte LM and holds none; put it there")
        return found

    def _read_run(self, folder: Path) -> StoredModel:
        checkpoint, corrupt = newest_checkpoint(folder)
        if not _is_native(checkpoint):
            raise UserError(
                f"'{checkpoint}' holds the model only in the parts of several processes; write it whole: "
                f"blt export {folder} --out FOLDER"
            )
        found = self.read_config(checkpoint)
        return replace(
            found,
            config=found.config.model_copy(update={"origin": origin_of_run(folder, checkpoint, found.config.origin)}),
            byte_lm=self._byte_lm_in(folder) or found.byte_lm,
            format="checkpoint of a run",
            warnings=corrupt,
        )


NATIVE = NativeFormat()


def save(folder: Path, model: nn.Module, config: Config, byte_lm: ByteLM | None = None) -> None:
    """Write a model in memory into an existing folder, in our format."""
    NATIVE.write(folder, StoredModel.of(model, config, byte_lm))


def is_run(folder: Path) -> bool:
    return (folder / "settings.yaml").is_file()


def _is_native(folder: Path) -> bool:
    return (folder / "config.json").is_file() and read_json_object(folder / "config.json").get("format") == FORMAT


def origin_of_run(folder: Path, checkpoint: Path, begun: Origin) -> Origin:
    """The training text and the bits per byte of a checkpoint, from the settings and metrics of its run.

    Args:
        begun: as the run began, stored in the checkpoint.
    """
    try:
        data = load_yaml(folder / "settings.yaml").get("data")
        data = data if isinstance(data, dict) else {}
        step = int(checkpoint.name.rpartition("-")[2])
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] <= step]
        measured = next((row for row in reversed(rows) if "validation_bits_per_byte" in row), {})
        return begun.model_copy(
            update={
                "training_text": _paths(data.get("train")),
                "training_bytes": rows[-1].get("bytes_seen") if rows else None,
                "validation_text": _paths(data.get("valid")),
                "bits_per_byte": measured.get("validation_bits_per_byte"),
            }
        )
    except (KeyError, TypeError, AttributeError, ValueError):  # corrupt files; the model does not need them
        return begun


def _paths(sources: Any) -> list[str]:
    sources = sources if isinstance(sources, list) else [sources] if sources else []
    return [masked(str(source["path"] if isinstance(source, dict) else source)) for source in sources]


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by their whole keys as nested ones: `{"a.b": 1}` is `{"a": {"b": 1}}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *parts, name = key.split(".")
        inner = found
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[name] = value
    return found


def our_settings(given: Mapping[str, Any], table: SettingsTable, where: str) -> dict[str, Any]:
    """Our nested settings from the values of another format.

    Raises:
        UserError: two keys give one of our settings different values.
        KeyError: a key is missing.
    """
    found: dict[str, Any] = {}
    for key, settings in table.items():
        for name in settings:
            value, known = given[key], found.setdefault(name, given[key])
            if value is not known and value != known:
                raise UserError(f"{where}: {key} is {shown(repr(value))}; only {shown(repr(known))} is known here")
    return nested(found)


def their_settings(model: ModelSettings, table: SettingsTable, format: str) -> dict[str, Any]:
    """The values of another format for a model, by their keys.

    Raises:
        UserError: settings that share a key differ, or it is a BLT without cross-attention.
    """
    if isinstance(model, BLTSettings) and model.cross_attention is None:
        raise UserError(f"{format}: the format has no BLT without cross-attention; use native")
    values = {key: [attrgetter(name)(model) for name in settings] for key, settings in table.items()}
    for key, found in values.items():
        if any(value != found[0] for value in found):
            names = ", ".join(table[key])
            raise UserError(f"{format}: the format has one {key} for {names}, and here they differ ({found})")
    return {key: found[0] for key, found in values.items()}


def check_blocks(model: ModelSettings, format: str, known: Sequence[str]) -> None:
    """Check that a format can express the options of a model's blocks.

    Args:
        known: those of `BLOCK_OPTIONS` that it can.

    Raises:
        UserError: it cannot.
    """
    is_blt = isinstance(model, BLTSettings)
    names = ("encoder", "global_transformer", "decoder") if is_blt else ("",)
    for name in names:
        stack: Any = getattr(model, name) if name else model
        has = {option: bool(getattr(stack, option)) for option in BLOCK_OPTIONS}
        has["head_size"] = stack.attention_dim != stack.dim
        for option in BLOCK_OPTIONS:
            if has[option] and option not in known:
                key = f"{name}.{option}" if name else option
                raise UserError(f"{format}: the format has no key for {key} ({getattr(stack, option)}); use native")


def check_tensors(stored: StoredModel) -> None:
    """Check that a model, and its byte LM, have the tensors of their settings.

    Raises:
        UserError: lists the tensors that are missing, unknown or have another shape.
    """
    try:
        NATIVE.with_tensors(stored, stored.tensors)
    except UserError as error:
        has_adapters = any("lora_" in name or ".base_layer." in name for name in stored.tensors)
        hint = "; merge the adapters into the model first, as merge_and_unload of PEFT does" if has_adapters else ""
        raise UserError(f"{error}{hint}") from None
    if stored.byte_lm is not None:
        check_tensors(stored.byte_lm)
