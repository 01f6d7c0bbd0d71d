"""The verbs that measure this machine."""

from typing import Annotated

import typer

from bytelatent.cli.options import DeviceOption, JsonOption
from bytelatent.cli.output import print_json
from bytelatent.terminal import Console

app = typer.Typer(help="Measure this machine.\n\nExample:  `blt bench train demo-blt`", no_args_is_help=True)


@app.command("train")
def bench_train(
    model: Annotated[str, typer.Argument(help="A preset; `blt info` lists them.")],
    num_bytes: Annotated[
        str | None, typer.Option("--bytes", help="Of a batch; several with commas. Left out: as suits the device.")
    ] = None,
    float8: Annotated[
        bool, typer.Option("--float8", help="The global transformer's products in 8-bit floats.")
    ] = False,
    checkpointing: Annotated[str, typer.Option(help="Of activations: none, selective, full.")] = "none",
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Forward and backward pass captured once and replayed.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure how fast this machine trains a preset on random bytes, and where the time goes.

    Example:  `blt bench train blt-1b --bytes 16384,65536`
    """
    from bytelatent.bench import BenchTrainSettings
    from bytelatent.bench import bench_train as run

    given = {"model": model, "bytes": num_bytes, "float8": "rowwise" if float8 else None}
    given |= {"checkpointing": checkpointing, "cuda_graph": cuda_graph, "device": device, "dtype": dtype}
    report = run(BenchTrainSettings.parse(given), Console(stderr=True))
    if as_json:
        print_json(report.plain())
    else:
        report.show(Console())
