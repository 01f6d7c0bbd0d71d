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
)
from bytelatent.terminal import Console, say


def prepare(
    source: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs, URLs, hf://datasets/OWNER/NAME, fineweb_edu, fineweb_edu_10bt, "
            "dclm_baseline_1.0, dclm_baseline_1.0_10prct."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder it fills.")],
    name: Annotated[str | None, typer.Option(help="NAME.chunk.00.jsonl, ...; the source's if left out.")] = None,
    memory: Annotated[float, typer.Option(help="GB for all processes, 0.25 at least; on a cluster each.")] = 4.0,
    chunks: Annotated[int | None, typer.Option(help="Files to cut it into; 32 where there are so many rows.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 42,
    validation: Annotated[int | None, typer.Option(help="Documents held out; 1 %, 10000 at most.")] = None,
    dedup: Annotated[bool, typer.Option("--dedup", help="Leave out documents whose text stood before.")] = False,
    text_key: TextKeyOption = "text",
    max_bad_rows: MaxBadRowsOption = 1000,
    max_row_bytes: MaxRowBytesOption = MAX_ROW_BYTES,
    max_corrupt: Annotated[int | None, typer.Option(hidden=True)] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one for each core if left out.")] = None,
    executor: Annotated[str, typer.Option(help="local, slurm, ray.")] = "local",
    partition: Annotated[str | None, typer.Option(help="Of the SLURM cluster.")] = None,
    time: Annotated[str, typer.Option(help="Limit of each SLURM job.")] = "24:00:00",
) -> None:
    """Shuffle text of any size as a whole and cut it into files for training; the same command goes on after a stop.

    Example:  `blt prepare text/*.jsonl more.parquet --out data --memory 8 --chunks 32`
    """
    given = dict(locals())
    given["max_bad_rows"] = bad_rows(max_bad_rows, given.pop("max_corrupt"), "--max-corrupt")
    from bytelatent.prepare import PrepareSettings
    from bytelatent.prepare import prepare as run

    run(PrepareSettings.parse(given), Console(stderr=True))


def calibrate(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs; stored entropies are used as they are.")],
    patch_bytes: Annotated[float, typer.Option(callback=bounded(1, 1e6), help="Mean bytes a patch should hold.")] = 4.5,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The byte LM, for text without entropies.")] = None,
    max_bytes: Annotated[int, typer.Option(callback=bounded(1), help="Text to measure on.")] = 1_000_000,
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
    from bytelatent.calibrate import calibrate_text
    from bytelatent.text.damage import must_have_read

    how = text_key, max_bad_rows, max_row_bytes
    found, unread = calibrate_text(text, patch_bytes, model, max_bytes, figure, device, *how, Console(stderr=True))
    say(found.model_dump_json(indent=1))
    must_have_read(unread)


def entropies(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs; each file becomes one below --out.")],
    out: Annotated[str, typer.Option(help="The folder it writes.")],
    model: ModelOption = DEFAULT_MODEL,
    starts: Annotated[
        float | None, typer.Option(help="Store the patch starts of this threshold (nats) instead: a bit each.")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="The starts of any entropy rule: threshold=0.3,monotonicity=true")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Ids of a document read at once; left out: as in the byte LM's training.")
    ] = None,
    batch_bytes: Annotated[int | None, typer.Option(help="Bytes read at once; left out: as suits the device.")] = None,
    text_key: TextKeyOption = "text",
    max_bad_rows: MaxBadRowsOption = MAX_BAD_ROWS,
    max_row_bytes: MaxRowBytesOption = MAX_ROW_BYTES,
    max_damaged: Annotated[int | None, typer.Option(hidden=True)] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
    rank: Annotated[int | None, typer.Option(help="Which part, from 0; else torchrun and SLURM say.")] = None,
    world: Annotated[int | None, typer.Option(help="Into how many parts they are divided.")] = None,
) -> None:
    """Store a byte LM's entropies beside text; the same command goes on where it was stopped.

    Example:  `blt entropies text/*.jsonl --model runs/byte_lm --out text-with-entropies`

    On 8 GPUs:  `torchrun --nproc-per-node 8 --no-python blt entropies text/*.jsonl --model runs/byte_lm --out DIR`
    """
    from bytelatent.entropies import entropies_beside, line_about

    console = Console(stderr=True)
    limits = bad_rows(max_bad_rows, max_damaged, "--max-damaged"), max_row_bytes
    batches = context, batch_bytes, text_key, *limits
    summary = entropies_beside(text, model, out, starts, rule, *batches, device, dtype, rank, world, console)
    say(line_about(summary, out))
