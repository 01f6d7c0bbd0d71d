"""The verbs that train, and look at runs."""

from pathlib import Path
from typing import Annotated

import typer

from bytelatent.cli.options import (
    DEFAULT_MODEL,
    MAX_BAD_ROWS,
    MAX_ROW_BYTES,
    JsonOption,
    MaxBadRowsOption,
    MaxRowBytesOption,
    TextKeyOption,
    bounded,
)
from bytelatent.cli.output import print_json
from bytelatent.configs import config_files, describe_config, find_config
from bytelatent.log import Console
from bytelatent.terminal import say

PRINT_CONFIG = "--print-config"  # as in bytelatent.command_line, whose imports take their time


def demo(
    minutes: Annotated[float, typer.Option(callback=bounded(0.1, 1e6), help="Time to spend, in minutes.")] = 3.5,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path(DEFAULT_MODEL),
    text: Annotated[
        str | None, typer.Option(help="Text to train on: a file or a folder. Default: Python's standard library.")
    ] = None,
    text_key: TextKeyOption = "text",
    max_bad_rows: MaxBadRowsOption = MAX_BAD_ROWS,
    max_row_bytes: MaxRowBytesOption = MAX_ROW_BYTES,
    seed: Annotated[int, typer.Option(callback=bounded(0), help="Seed of the weights and of the shuffling.")] = 0,
) -> None:
    """Train a byte LM and a BLT on this machine, measure them, and write a report.

    Example:  `blt demo --minutes 20 --text ~/notes`
    """
    from bytelatent.commands.demo import run_demo

    run_demo(minutes, out, text, seed, text_key, max_bad_rows, max_row_bytes)


def train(
    settings: Annotated[
        list[str] | None, typer.Argument(help="config=FILE, or config=NAME of `blt configs`, and key=value.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option(PRINT_CONFIG, help="Show all settings with their values and sources, and exit.")
    ] = False,
) -> None:
    """Train a byte LM or a BLT. To resume a run, give the same command.

    Example:  `blt train config=byte_lm run=runs/mine data.train=text/*.jsonl steps=2000`

    A BLT:  `blt train config=blt_1b entropy_model=runs/mine data.train=text/*.jsonl model.encoder.window=256`

    A run of a minute, on text that Python brings:  `config=debug`

    Settings: `--print-config` lists them all with their values and sources; docs/reference.md says what each means.
    """
    from bytelatent.commands.train import command

    command([*(settings or []), *([PRINT_CONFIG] if print_config else [])])


def configs(
    name: Annotated[str | None, typer.Argument(help="Print this configuration.")] = None,
) -> None:
    """List the configurations that the package brings, or print one; `blt train config=NAME` finds them anywhere.

    Example:  `blt configs debug > mine.yaml`
    """
    if name is not None:
        say(find_config(name).read_text(encoding="utf-8").rstrip("\n"))
        return
    files = config_files()
    width = max(map(len, files))
    for known, path in files.items():
        say(f"{known:<{width}}  {describe_config(path)}")


def runs(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, or folders that hold them.")],
    figure: Annotated[
        Path | None, typer.Option(help="Draw bits per byte of training and held-out text: a .png, .svg or .pdf file.")
    ] = None,
    against: Annotated[str, typer.Option(help="Horizontal axis of the figure: bytes or flops.")] = "bytes",
    as_json: JsonOption = False,
) -> None:
    """Compare training runs, finished or not: bits per byte, speed, time, and the settings that differ.

    Example:  `blt runs runs/demo runs/mine --figure curves.svg`
    """
    from bytelatent.report import compare_runs, write_runs_figure

    comparison = compare_runs(folders)
    if figure is not None:
        write_runs_figure(figure, comparison.runs, against)
    if as_json:
        print_json(comparison.plain())
    else:
        comparison.show(Console())


def launch(
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings of the script, key=value. They override its config.")
    ] = None,
    script: Annotated[str, typer.Option(help="Module to run. It takes config=PATH.")] = "bytelatent.train",
    config: Annotated[
        str | None, typer.Option(help="Configuration of the script: a file, or a name that `blt configs` lists.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job. Default: the last part of --dump-dir.")] = None,
    dump_dir: Annotated[
        str | None, typer.Option(help="Folder of the job. Default: `run` of the config, else runs/NAME.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="Number of nodes.")] = 1,
    ngpu: Annotated[
        int | None, typer.Option(help="GPUs per node, with one process each. 0 uses the CPU. Default: all GPUs.")
    ] = None,
    nproc: Annotated[int, typer.Option(help="Processes per node on the CPU, with --ngpu 0.")] = 1,
    ncpu: Annotated[int | None, typer.Option(help="CPU cores per process. Default: an even share.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory per node, such as 64G. 0 uses all of it.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit: minutes, 12:00:00 or 2-00:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM partition. `sinfo` lists them.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM account to charge.")] = None,
    qos: Annotated[str | None, typer.Option(help="SLURM quality of service.")] = None,
    constraint: Annotated[
        str | None, typer.Option(help="Features that the nodes must have, as for sbatch --constraint.")
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes to exclude.")] = None,
    launcher: Annotated[
        str, typer.Option(help="How processes start: torchrun (one per node, by srun) or srun (one per process).")
    ] = "torchrun",
    grace: Annotated[
        int, typer.Option(help="Seconds before the time limit at which the job receives the signal to save and stop.")
    ] = 120,
    requeue: Annotated[
        bool | None, typer.Option(help="Requeue a job that was stopped. Default: for training only.")
    ] = None,
    copy_code: Annotated[bool, typer.Option(help="Run a copy of the present code.")] = True,
    override: Annotated[bool, typer.Option("--override", help="Overwrite an earlier launch that has no run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write all files, but do not submit the job.")] = False,
) -> None:
    """Submit a script to a SLURM cluster, with its code, settings and batch script in one folder.

    Example:  `blt launch --config blt_1b --nodes 2 --partition gpu steps=50000`

    To submit it again:  `sbatch runs/blt_1b/submit.slurm`
    """
    given = dict(locals())
    from bytelatent.commands.launch import launch_script

    of_script = given.pop("settings") or []
    say(launch_script(given, of_script))
