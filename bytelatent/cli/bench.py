"""The verbs that measure this machine."""

from typing import Annotated

import typer

from bytelatent.cli.options import DeviceOption, JsonOption
from bytelatent.cli.output import print_json
from bytelatent.log import Console

app = typer.Typer(help="Measure this machine.\n\nExample:  `blt bench train demo-blt`", no_args_is_help=True)


@app.command("train")
def bench_train(
    model: Annotated[str, typer.Argument(help="A preset; `blt info` lists them.")],
    num_bytes: Annotated[
        str | None,
        typer.Option("--bytes", help="Bytes of a batch; several with commas. Default: chosen for the device."),
    ] = None,
    float8: Annotated[
        bool, typer.Option("--float8", help="Use 8-bit floats for the matrix products of the global transformer.")
    ] = False,
    checkpointing: Annotated[str, typer.Option(help="Activation checkpointing: none, selective or full.")] = "none",
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Capture forward and backward pass as a CUDA graph and replay it.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="Precision: auto, float32 or bfloat16.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure how fast this machine trains a preset on random bytes, and where the time goes.

    Example:  `blt bench train blt-1b --bytes 16384,65536`
    """
    from bytelatent.commands.bench import BenchTrainSettings
    from bytelatent.commands.bench import bench_train as run

    given = {"model": model, "bytes": num_bytes, "float8": "rowwise" if float8 else None}
    given |= {"checkpointing": checkpointing, "cuda_graph": cuda_graph, "device": device, "dtype": dtype}
    report = run(BenchTrainSettings.parse(given), Console(stderr=True))
    if as_json:
        print_json(report.plain())
    else:
        report.show(Console())
