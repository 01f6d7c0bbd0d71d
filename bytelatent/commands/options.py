"""Settings of the verbs. Their fields and docstrings are the options and the help of `blt VERB`.

Those of some verbs are in `VERB_options.py`. What a verb does is in the file of its name. Nothing here imports torch,
so that help is shown at once.
"""

import logging
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from bytelatent.config import ARGUMENT, Option, Settings, must_be_named
from bytelatent.inference.settings import MAX_NEW_BYTES, MAX_SAMPLES, REMOVED, KVCacheNumbers, Quantization, Sampling
from bytelatent.launch import LaunchSettings
from bytelatent.packaged import TINY
from bytelatent.text import MAX_ROW_BYTES
from bytelatent.text.documents import MAX_BAD_ROWS
from bytelatent.text.stored import MAX_TEXT_BYTES

DEFAULT_MODEL = "runs/demo"
DEFAULT_PATCH_BYTES = 4.5

LOGGER = logging.getLogger(__name__)

Folder = Annotated[str, AfterValidator(lambda path: must_be_named(path, "a folder"))]
Model = Annotated[str, Option(("--model", "-m"))]
PatchBytes = Annotated[float, Field(ge=1, le=1e6)]
NumBytes = Annotated[int, Field(ge=1, lt=2**63)]


def model_named(settings: Any) -> str | None:
    """The model that a command was given; None if there was none."""
    return settings.model if "model" in settings.model_fields_set else None


def default_model() -> str:
    """The model where none is named: the demo's run, or else the one in the package."""
    if Path(DEFAULT_MODEL).exists():
        return DEFAULT_MODEL
    LOGGER.info(f"no model is named and '{DEFAULT_MODEL}' does not exist: using {TINY}, the small model in the package")
    return TINY


class JsonSettings(Settings):
    """Attributes:
    as_json: print JSON.
    """

    as_json: Annotated[bool, Option(("--json",))] = False


class EntropyModelSettings(Settings):
    """Attributes:
    entropy_model: the byte LM that finds patches, if the model's folder does not hold it.
    """

    old_names: ClassVar[dict[str, str]] = {"entropy": "entropy_model"}

    entropy_model: str | None = None


class ThresholdSettings(EntropyModelSettings):
    """Attributes:
    threshold: threshold of the patches, in nats, in place of the model's own: a larger one makes larger patches.
    """

    threshold: Annotated[float | None, Field(allow_inf_nan=False)] = None


class RowSettings(Settings):
    """Attributes:
    text_key: the key or column that holds the text.
    max_bad_rows: largest number of bad rows and files to pass over.
    max_row_bytes: longest row, in bytes. A longer row is a bad row.
    """

    text_key: str = "text"
    max_bad_rows: int = Field(default=MAX_BAD_ROWS, ge=0)
    max_row_bytes: int = Field(default=MAX_ROW_BYTES, ge=1, le=MAX_TEXT_BYTES)


class TextSettings(RowSettings):
    """Attributes:
    text: files, folders or globs.
    """

    text: Annotated[list[str], ARGUMENT]


class DemoSettings(RowSettings):
    """Train a byte LM and a BLT on this machine, measure them, and write a report.

    Example:  `blt demo --minutes 20 --text ~/notes`

    Attributes:
        minutes: time to spend, in minutes.
        out: folder to write.
        text: text to train on: a file or a folder. Default: Python's standard library.
        seed: seed of the weights and of the shuffling.
    """

    minutes: float = Field(default=3.5, ge=0.1, le=1e6)
    out: Path = Path(DEFAULT_MODEL)
    text: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)


class TrainArguments(Settings):
    """Train a byte LM, a token LM or a BLT. To resume a run, give the same command.

    Example:  `blt train config=byte_lm run=runs/mine data.train=text/*.jsonl steps=2000`

    A BLT:  `blt train config=blt_1b entropy_model=runs/mine data.train=text/*.jsonl model.encoder.window=256`

    From weights that exist:  `blt train init=facebook/blt-1b run=runs/mine data.train=text/*.jsonl steps=2000`

    A run of a minute, on text that Python brings:  `config=debug`

    Settings: `--print-config` lists them all with their values and sources; docs/settings.md explains each.

    Attributes:
        settings: settings as key=value; config=FILE, or config=NAME of `blt configs`, reads a file of them.
        print_config: show all settings with their values and sources, and exit.
    """

    settings: Annotated[list[str], ARGUMENT] = Field(default=[])
    print_config: bool = False


class ConfigsSettings(Settings):
    """List the configurations that the package brings, or print one; `blt train config=NAME` finds them anywhere.

    Example:  `blt configs debug > mine.yaml`

    Attributes:
        name: print this configuration.
    """

    name: Annotated[str | None, ARGUMENT] = None


class RunsSettings(JsonSettings):
    """Compare training runs, finished or not: bits per byte, speed, time, and the settings that differ.

    Example:  `blt runs runs/demo runs/mine`

    Their curves:  `blt plot runs runs/demo runs/mine`

    Attributes:
        folders: folders of runs, or folders that hold them.
    """

    folders: Annotated[list[Path], ARGUMENT]


class LaunchArguments(LaunchSettings):
    """Submit a script to a SLURM cluster, with its code, settings and batch script in one folder.

    Example:  `blt launch --config blt_1b --nodes 2 --partition gpu steps=50000`

    To submit it again:  `sbatch runs/blt_1b/submit.slurm`

    Attributes:
        settings: settings of the script, key=value. They override its config.
    """

    settings: Annotated[list[str], ARGUMENT] = Field(default=[])


class CalibrateSettings(TextSettings):
    """Find the threshold that gives a wanted patch size, with a byte LM or on stored entropies.

    Example:  `blt calibrate data/entropies/*.chunk.*.parquet --patch-bytes 6 --figure sizes.png`

    Attributes:
        text: files, folders or globs. Entropies that are stored beside the text are used as they are.
        patch_bytes: mean patch size to reach, in bytes.
        model: the byte LM, for text without entropies.
        max_bytes: bytes of text to measure on.
        reset_at_newline: for a model whose patching settings have reset_at_newline.
        figure: draw patch size against threshold: a .png, .svg or .pdf file.
        device: device: auto, cpu, cuda or mps.
    """

    patch_bytes: PatchBytes = DEFAULT_PATCH_BYTES
    model: Annotated[str | None, Option(("--model", "-m"))] = None
    max_bytes: NumBytes = 1_000_000
    reset_at_newline: bool = False
    figure: Path | None = None
    device: str = "auto"


class TokenizerSettings(TextSettings, JsonSettings):
    """Train a byte-level BPE tokenizer for token LMs. The same text gives the same file.

    Example:  `blt tokenizer text/*.jsonl --vocab 16384 --out tokenizer.json`

    Then:  `blt train config=token_lm_100m data.tokenizer=tokenizer.json data.train=text/*.jsonl`

    Attributes:
        vocab: number of ids, special ids and the 256 bytes included.
        out: file to write, a tokenizer.json.
        max_bytes: bytes of text to train on. Default: all.
    """

    vocab: int = Field(default=16_384, ge=261, le=2**20)
    out: Annotated[str, AfterValidator(lambda path: must_be_named(path, "a file"))]
    max_bytes: NumBytes | None = None


class EntropiesSettings(TextSettings):
    """Store a byte LM's entropies beside text; the same command resumes.

    Example:  `blt entropies text/*.jsonl --model runs/byte_lm --out text-with-entropies`

    On 8 GPUs:  `torchrun --nproc-per-node 8 --no-python blt entropies text/*.jsonl --model runs/byte_lm --out DIR`

    Attributes:
        text: files, folders or globs. Each file becomes one file below --out.
        out: folder to write.
        model: the byte LM: a run, or a folder with a model.
        starts: store patch starts at this threshold (nats) instead of entropies: one bit per byte.
        patching: store patch starts of these patching settings: threshold=0.3,monotonicity=true
        reset_at_newline: reset the byte LM's context at each newline, for patching.reset_at_newline=true in training.
        context: ids of a document to read at once. Default: as in the byte LM's training.
        batch_bytes: bytes of a batch. Default: chosen for the device.
        device: device: auto, cpu, cuda or mps.
        dtype: precision: auto, float32 or bfloat16.
        rank: rank of this process, from 0. Default: as torchrun or SLURM set it.
        world_size: the number of processes that divide the files.
    """

    old_names: ClassVar[dict[str, str]] = {"rule": "patching", "world": "world_size", "max_damaged": "max_bad_rows"}

    out: Folder
    model: Model = DEFAULT_MODEL
    starts: Annotated[float | None, Field(allow_inf_nan=True)] = None  # the patching settings check it
    patching: str | None = None
    reset_at_newline: bool = False
    context: int | None = None
    batch_bytes: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    rank: int | None = None
    world_size: int | None = None


class GenerateSettings(ThresholdSettings):
    """Continue a text, or the rows of a file in batches.

    Example:  `blt generate "The history of" --max-new-bytes 300 --temperature 0.7`

    Rows:  `blt generate --jsonl prompts.jsonl --out answers.jsonl --batch-size 64`

    Attributes:
        prompt: text to continue. Default: standard input, without --file and --jsonl.
        model: a run, a folder with a model, OWNER/NAME on the hub, or tiny, the model in the package, which is used
            where this is not given and there is no demo.
        file: file that holds the prompt.
        jsonl: file of rows {"prompt": ...}, which are continued in batches. A row may hold max_new_bytes and settings
            of the sampling. The file may be compressed. - is standard input.
        out: new file for the rows of --jsonl, in their order. Default: standard output. The same command resumes it.
        max_new_bytes: largest number of bytes to generate.
        json_schema: file with a JSON schema, which every continuation meets.
        regex: regular expression, which every continuation matches as a whole.
        grammar: file with a grammar in llguidance's form of Lark, which every continuation follows.
        samples: number of continuations of each prompt.
        batch_size: batch size of --jsonl.
        log_probabilities: write the log-probability of each byte into the rows of --jsonl.
        device: device: auto, cpu, cuda or mps.
        dtype: precision: float32, bfloat16 or auto (as the weights are stored).
        quantize: quantization of large matrices, faster on a GPU: int8, fp8 or full (none).
        kv_cache: KV caches: int8 for about half of bfloat16's memory, or full.
    """

    old_names: ClassVar[dict[str, str]] = {
        "entropy": "entropy_model",
        "rows": "batch_size",
        "weights": "quantize",
    }
    removed: ClassVar[dict[str, str]] = REMOVED

    prompt: Annotated[str | None, ARGUMENT] = None
    model: Model = DEFAULT_MODEL
    file: Path | None = None
    jsonl: str | None = None
    out: Path | None = None
    max_new_bytes: Annotated[int, Option(("--max-new-bytes", "-n"))] = Field(default=200, ge=1, le=MAX_NEW_BYTES)
    sampling: Sampling = Sampling()
    json_schema: Annotated[Path | None, Option(("--schema",))] = None
    regex: str | None = None
    grammar: Path | None = None
    samples: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    batch_size: int = Field(default=16, ge=1, le=10**6)
    log_probabilities: bool = False
    device: str = "auto"
    dtype: str = "auto"
    quantize: Quantization = "full"
    kv_cache: KVCacheNumbers = "full"


class PatchesSettings(JsonSettings):
    """Show where patches begin in a text, by a BLT, a byte LM, or a patching mode that needs neither.

    Example:  `blt patch "Daenerys Targaryen is in Game of Thrones" --mode entropy,space,static:4`

    Attributes:
        text: text to patch. Default: standard input.
        model: a run, a folder with a model, or tiny, the model in the package, which is used where this is not given
            and there is no demo.
        mode: patching mode, or several with commas, each with its setting: static:4. Default: the model's.
        threshold: threshold in nats, in place of the model's own.
        context: read the text in pieces of this many bytes, as training and eval do. Default: as a whole.
        entropies: show each byte's entropy.
        html: write an HTML page instead.
    """

    old_names: ClassVar[dict[str, str]] = {"rule": "mode", "compare": "mode"}

    text: Annotated[str | None, ARGUMENT] = None
    model: Model = DEFAULT_MODEL
    mode: str = "model"
    threshold: Annotated[float | None, Field(allow_inf_nan=False)] = None
    context: int | None = None
    entropies: Annotated[bool, Option(("--entropies", "-e"))] = False
    html: Path | None = None


class ConvertSettings(EntropyModelSettings):
    """Write a model in another format, with little memory for any size.

    Example:  `blt convert runs/demo demo-hf --to hf --licence apache-2.0`

    Released weights:  `blt convert facebook/blt-1b blt-1b-hf --to hf`

    Attributes:
        source: a run, a folder in any known format, or OWNER/NAME on the hub.
        target: folder to write.
        to: format: native, hf (transformers) or meta (Meta's hub format).
        revision: branch, tag or commit of a repository.
        licence: licence to state on the model card. Default: the licence of the source.
    """

    source: Annotated[str, ARGUMENT]
    target: Annotated[Folder, ARGUMENT]
    to: str = "native"
    revision: str | None = None
    licence: str | None = None


class ExportSettings(Settings):
    """Write the model of a run's checkpoint. Several processes may have written the checkpoint in parts.

    Example:  `blt export runs/mine --step 5000 --out mine-5000`

    Attributes:
        run: folder of a run.
        out: folder to write, new or empty.
        step: step of the checkpoint. Default: the last complete checkpoint.
    """

    run: Annotated[str, ARGUMENT]
    out: Folder
    step: int | None = Field(default=None, ge=1)


class InfoSettings(EntropyModelSettings, JsonSettings):
    """Show a model's shape, parameters and FLOPs per byte, part by part, without reading weights.

    Example:  `blt info blt-1b --patch-bytes 6`

    Attributes:
        model: a preset (blt-1b, blt-8b, entropy, ...), a run, a folder, OWNER/NAME on the hub, or tiny.
        patch_bytes: mean patch size, in bytes; of a token LM the mean token. Default: as the run measured it, else 4.5.
        context: context, in bytes. Default: as in the model's training, 8192 of a preset.
        revision: branch, tag or commit of a repository.
    """

    model: Annotated[str, ARGUMENT] = ""
    patch_bytes: PatchBytes | None = None
    context: NumBytes | None = None
    revision: str | None = None
