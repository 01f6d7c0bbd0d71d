"""The verbs that make text ready for training."""

from pathlib import Path
from typing import Annotated

import typer

from bytelatent.cli.options import (
    DEFAULT_MODEL,
    MAX_BAD_ROWS,
    MAX_ROW_BYTES,
    DeviceOption,
    MaxBadRowsOption,
    MaxRowBytesOption,
    ModelOption,
    TextKeyOption,
    bad_rows,
    bounded,
    named,
)
from bytelatent.log import Console
from bytelatent.terminal import say


def prepare(
    source: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs, URLs, hf://datasets/OWNER/NAME, fineweb_edu, fineweb_edu_10bt, "
            "dclm_baseline_1.0, dclm_baseline_1.0_10prct."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    name: Annotated[
        str | None, typer.Option(help="Prefix of the files: NAME.chunk.00.jsonl. Default: the source's name.")
    ] = None,
    memory: Annotated[
        float, typer.Option(help="Memory in GB of all processes together, at least 0.25. On a cluster, of each task.")
    ] = 4.0,
    chunks: Annotated[
        int | None, typer.Option(help="Number of files to write. Default: 32, or fewer for few rows.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Shuffle seed.")] = 42,
    validation: Annotated[
        int | None, typer.Option(help="Number of documents to hold out. Default: 1 %, at most 10000.")
    ] = None,
    dedup: Annotated[bool, typer.Option("--dedup", help="Leave out documents whose text occurred before.")] = False,
    text_key: TextKeyOption = "text",
    max_bad_rows: MaxBadRowsOption = 1000,
    max_row_bytes: MaxRowBytesOption = MAX_ROW_BYTES,
    max_corrupt: Annotated[int | None, typer.Option(hidden=True)] = None,
    workers: Annotated[int | None, typer.Option(help="Number of processes. Default: one per core.")] = None,
    executor: Annotated[str, typer.Option(help="Where to run: local, slurm or ray.")] = "local",
    partition: Annotated[str | None, typer.Option(help="SLURM partition.")] = None,
    time: Annotated[str, typer.Option(help="Time limit of each SLURM job.")] = "24:00:00",
) -> None:
    """Shuffle text of any size as a whole and cut it into files for training; the same command resumes.

    Example:  `blt prepare text/*.jsonl more.parquet --out data --memory 8 --chunks 32`
    """
    given = dict(locals())
    given["max_bad_rows"] = bad_rows(max_bad_rows, given.pop("max_corrupt"), "--max-corrupt")
    from bytelatent.prepare import PrepareSettings
    from bytelatent.prepare import prepare as run

    run(PrepareSettings.parse(given))


def calibrate(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs; stored entropies are used as they are.")],
    patch_bytes: Annotated[
        float, typer.Option(callback=bounded(1, 1e6), help="Mean patch size to reach, in bytes.")
    ] = 4.5,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The byte LM, for text without entropies.")] = None,
    max_bytes: Annotated[int, typer.Option(callback=bounded(1), help="Bytes of text to measure on.")] = 1_000_000,
    figure: Annotated[
        Path | None, typer.Option(help="Draw patch size against threshold: a .png, .svg or .pdf.")
    ] = None,
    text_key: TextKeyOption = "text",
    max_bad_rows: MaxBadRowsOption = MAX_BAD_ROWS,
    max_row_bytes: MaxRowBytesOption = MAX_ROW_BYTES,
    device: DeviceOption = "auto",
) -> None:
    """Find the threshold that gives a wanted patch size, with a byte LM or on stored entropies.

    Example:  `blt calibrate data/entropies/*.chunk.*.parquet --patch-bytes 6 --figure sizes.png`
    """
    from bytelatent.commands.calibrate import calibrate_text
    from bytelatent.text.bad_rows import must_have_read

    how = text_key, max_bad_rows, max_row_bytes
    found, unread = calibrate_text(text, patch_bytes, model, max_bytes, figure, device, *how)
    say(found.model_dump_json(indent=1))
    must_have_read(unread)


def entropies(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs; each file becomes one file below --out.")],
    out: Annotated[str, typer.Option(callback=named, help="Folder to write.")],
    model: ModelOption = DEFAULT_MODEL,
    starts: Annotated[
        float | None,
        typer.Option(help="Store patch starts at this threshold (nats) instead of entropies: one bit per byte."),
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="Store patch starts of these patching settings: threshold=0.3,monotonicity=true")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Ids of a document to read at once. Default: as in the byte LM's training.")
    ] = None,
    batch_bytes: Annotated[int | None, typer.Option(help="Bytes of a batch. Default: chosen for the device.")] = None,
    text_key: TextKeyOption = "text",
    max_bad_rows: MaxBadRowsOption = MAX_BAD_ROWS,
    max_row_bytes: MaxRowBytesOption = MAX_ROW_BYTES,
    max_damaged: Annotated[int | None, typer.Option(hidden=True)] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="Precision: auto, float32 or bfloat16.")] = "auto",
    rank: Annotated[
        int | None, typer.Option(help="Rank of this process, from 0. Default: as torchrun or SLURM set it.")
    ] = None,
    world: Annotated[
        int | None, typer.Option(help="World size: the number of processes that divide the files.")
    ] = None,
) -> None:
    """Store a byte LM's entropies beside text; the same command resumes.

    Example:  `blt entropies text/*.jsonl --model runs/byte_lm --out text-with-entropies`

    On 8 GPUs:  `torchrun --nproc-per-node 8 --no-python blt entropies text/*.jsonl --model runs/byte_lm --out DIR`
    """
    from bytelatent.commands.entropies import entropies_beside, line_about

    console = Console(stderr=True)
    limits = bad_rows(max_bad_rows, max_damaged, "--max-damaged"), max_row_bytes
    batches = context, batch_bytes, text_key, *limits
    summary = entropies_beside(text, model, out, starts, rule, *batches, device, dtype, rank, world, console)
    say(line_about(summary, out))
