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
from bytelatent.terminal import Console, say

PRINT_CONFIG = "--print-config"  # as in bytelatent.command_line, whose imports take their time


def demo(
    minutes: Annotated[float, typer.Option(callback=bounded(0.1, 1e6), help="About how long it may take.")] = 3.5,
    out: Annotated[Path, typer.Option(help="The folder it writes.")] = Path(DEFAULT_MODEL),
    text: Annotated[str | None, typer.Option(help="Your own text: a file or a folder.")] = None,
    text_key: TextKeyOption = "text",
    max_bad_rows: MaxBadRowsOption = MAX_BAD_ROWS,
    max_row_bytes: MaxRowBytesOption = MAX_ROW_BYTES,
    seed: Annotated[int, typer.Option(callback=bounded(0), help="Of the weights and the order of the text.")] = 0,
) -> None:
    """Train a byte LM and a BLT on this machine, measure them, and write a page to look at.

    Example:  `blt demo --minutes 20 --text ~/notes`
    """
    from bytelatent.demo import run_demo

    run_demo(minutes, out, text, seed, Console(), text_key, max_bad_rows, max_row_bytes)


def train(
    settings: Annotated[
        list[str] | None, typer.Argument(help="config=FILE, or config=NAME of `blt configs`, and key=value.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option(PRINT_CONFIG, help="Show all settings, each with its value and source; train nothing.")
    ] = False,
) -> None:
    """Train a byte LM or a BLT; the same command goes on with a run that was stopped.

    Example:  `blt train config=byte_lm run=runs/mine data.train=text/*.jsonl steps=2000`

    A BLT:  `blt train config=blt_1b byte_lm=runs/mine data.train=text/*.jsonl model.encoder.window=256`

    A try of a minute, on text that every machine has:  `config=debug`

    Settings: `--print-config` lists them all with their values and sources; docs/reference.md says what each means.
    """
    from bytelatent.train import command

    command([*(settings or []), *([PRINT_CONFIG] if print_config else [])])


def configs(
    name: Annotated[str | None, typer.Argument(help="Print this one, to save it and change it.")] = None,
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
        Path | None, typer.Option(help="Draw bits per byte, training and held out: a .png, .svg or .pdf.")
    ] = None,
    against: Annotated[str, typer.Option(help="What the figure draws them against: bytes, flops.")] = "bytes",
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
    settings: Annotated[list[str] | None, typer.Argument(help="key=value of the script, over its config.")] = None,
    script: Annotated[str, typer.Option(help="The module to run; it takes config=PATH.")] = "bytelatent.train",
    config: Annotated[str | None, typer.Option(help="The script's own settings.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the job; the last part of --dump-dir if left out.")] = None,
    dump_dir: Annotated[
        str | None, typer.Option(help="The job's folder; left out: `run` of the config, else runs/NAME.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="How many.")] = 1,
    ngpu: Annotated[
        int | None, typer.Option(help="GPUs of each node, a process each; 0: the CPU. All of them if left out.")
    ] = None,
    nproc: Annotated[int, typer.Option(help="Processes of each node on its CPU; only with --ngpu 0.")] = 1,
    ncpu: Annotated[int | None, typer.Option(help="Cores of each process; an even share if left out.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of each node: 64G; 0 is all of it.")] = None,
    time: Annotated[str | None, typer.Option(help="Limit: minutes, 12:00:00, 2-00:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Of the cluster; `sinfo` lists them.")] = None,
    account: Annotated[str | None, typer.Option(help="Who pays.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Features that the nodes must have.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes to keep away from.")] = None,
    launcher: Annotated[str, typer.Option(help="torchrun (one a node, by srun), srun (every process).")] = "torchrun",
    grace: Annotated[int, typer.Option(help="Seconds before the limit at which it is told to save and stop.")] = 120,
    requeue: Annotated[
        bool | None, typer.Option(help="Start it again where it was told to stop; left out: training only.")
    ] = None,
    copy_code: Annotated[bool, typer.Option(help="Run a copy of the code as it is now.")] = True,
    override: Annotated[bool, typer.Option("--override", help="Write over an earlier launch without a run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write everything and submit nothing.")] = False,
) -> None:
    """Hand a script to a SLURM cluster: code, settings and batch script in one folder, and the folder to sbatch.

    Example:  `blt launch --config blt_1b --nodes 2 --partition gpu steps=50000`

    Start it again:  `sbatch runs/byte_lm/submit.slurm`
    """
    given = dict(locals())
    from bytelatent.stool import launch_script

    of_script = given.pop("settings") or []
    say(launch_script(given, of_script))
