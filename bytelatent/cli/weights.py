"""The verbs about a model's weights and shape."""

from typing import Annotated

import typer

from bytelatent.cli.options import EntropyOption, JsonOption, RevisionOption, bounded, named
from bytelatent.cli.output import print_json
from bytelatent.log import Console
from bytelatent.terminal import say


def convert(
    source: Annotated[str, typer.Argument(help="A run, a folder in any known format, or OWNER/NAME on the hub.")],
    target: Annotated[str, typer.Argument(callback=named, help="Folder to write.")],
    to: Annotated[str, typer.Option(help="Format: native, hf (transformers) or meta (Meta's hub format).")] = "native",
    entropy: EntropyOption = None,
    revision: RevisionOption = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence to state on the model card. Default: the licence of the source.")
    ] = None,
) -> None:
    """Write a model in another format, with little memory for any size.

    Example:  `blt convert runs/demo demo-hf --to hf --licence apache-2.0`

    Released weights:  `blt convert facebook/blt-1b blt-1b-hf --to hf`
    """
    from bytelatent.commands.convert import convert_model

    say(str(convert_model(source, target, to, entropy, revision, licence, Console(stderr=True))))


def export(
    run: Annotated[str, typer.Argument(help="Folder of a run.")],
    out: Annotated[str, typer.Option(callback=named, help="Folder to write, new or empty.")],
    step: Annotated[
        int | None,
        typer.Option(callback=bounded(1), help="Step of the checkpoint. Default: the last complete checkpoint."),
    ] = None,
) -> None:
    """Write the model of a run's checkpoint. Several processes may have written the checkpoint in parts.

    Example:  `blt export runs/mine --step 5000 --out mine-5000`
    """
    from bytelatent.commands.export import export as run_export

    say(str(run_export(run, step, out, Console(stderr=True))))


def info(
    model: Annotated[
        str, typer.Argument(help="A preset (blt-1b, blt-8b, entropy, ...), a run, a folder, or OWNER/NAME on the hub.")
    ] = "",
    patch_bytes: Annotated[float, typer.Option(callback=bounded(1, 1e6), help="Mean patch size, in bytes.")] = 4.5,
    context: Annotated[int, typer.Option(callback=bounded(1), help="Context, in bytes.")] = 8192,
    entropy: EntropyOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a model's shape, parameters and FLOPs per byte, part by part, without reading weights.

    Example:  `blt info blt-1b --patch-bytes 6`
    """
    from bytelatent.commands.info import describe

    description = describe(model, patch_bytes, context, entropy, revision)
    if as_json:
        print_json(description.plain())
    else:
        description.show(Console())
