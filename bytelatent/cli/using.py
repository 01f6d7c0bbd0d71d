"""The verbs that use a model on text."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bytelatent.cli.options import (
    DEFAULT_MODEL,
    MAX_BAD_ROWS,
    MAX_ROW_BYTES,
    DeviceOption,
    EntropyOption,
    JsonOption,
    MaxBadRowsOption,
    MaxRowBytesOption,
    ModelOption,
    TextKeyOption,
    bounded,
)
from bytelatent.cli.output import print_json
from bytelatent.errors import UserError
from bytelatent.log import Console
from bytelatent.terminal import say


def evaluate(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs.")],
    model: ModelOption = DEFAULT_MODEL,
    entropy: EntropyOption = None,
    max_bytes: Annotated[
        int | None, typer.Option(callback=bounded(1), help="Bytes of text to measure. Default: all.")
    ] = None,
    text_key: TextKeyOption = "text",
    max_bad_rows: MaxBadRowsOption = MAX_BAD_ROWS,
    max_row_bytes: MaxRowBytesOption = MAX_ROW_BYTES,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure the bits per byte of a model on text.

    Example:  `blt eval held-out/*.jsonl --model runs/demo`
    """
    from bytelatent.commands.evaluate import evaluate_model
    from bytelatent.text.bad_rows import must_have_read

    how = text_key, max_bad_rows, max_row_bytes
    result = evaluate_model(model, text, entropy, max_bytes, device, *how)
    if as_json:
        print_json(result)
    else:
        patches = "" if result["mean_patch_bytes"] is None else f"  {result['mean_patch_bytes']:.2f} bytes a patch"
        say(f"{result['bits_per_byte']:.4f} bits per byte on {result['num_bytes']:,} bytes{patches}")
    must_have_read(result["unread"])


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue. Default: standard input, without --file and --jsonl.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    file: Annotated[Path | None, typer.Option(help="File that holds the prompt.")] = None,
    jsonl: Annotated[
        str | None,
        typer.Option(help='File of rows {"prompt": ...}, which are continued in batches. - is standard input.'),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New file for the rows of --jsonl. Default: standard output.")
    ] = None,
    max_new_bytes: Annotated[
        int, typer.Option("--max-new-bytes", "-n", help="Largest number of bytes to generate.")
    ] = 200,
    temperature: Annotated[float, typer.Option(help="Sampling temperature. 0 takes the most likely byte.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely bytes.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most likely bytes that reach this probability.")
    ] = None,
    min_p: Annotated[float | None, typer.Option(help="Smallest probability, as a share of the largest.")] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Values above 1 make bytes that occurred less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text at which generation stops; may be repeated. In bash a line break is $'\\n'."),
    ] = None,
    valid_utf8: Annotated[bool, typer.Option("--valid-utf8", help="Generate valid UTF-8 only.")] = False,
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = 0,
    samples: Annotated[int, typer.Option(help="Number of continuations of each prompt.")] = 1,
    rows: Annotated[int, typer.Option(help="Batch size of --jsonl.")] = 16,
    log_probabilities: Annotated[
        bool,
        typer.Option("--log-probabilities", help="Write the log-probability of each byte into the rows of --jsonl."),
    ] = False,
    entropy: EntropyOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, typer.Option(help="Precision: float32, bfloat16 or auto (as the weights are stored).")
    ] = "auto",
    weights: Annotated[
        str, typer.Option(help="Quantization of large matrices, faster on a GPU: int8, fp8 or full (none).")
    ] = "full",
    ahead: Annotated[
        int,
        typer.Option(
            help="Speculative decoding: bytes per step, of which all but one are drafts. The text stays the same."
        ),
    ] = 1,
) -> None:
    """Continue a text, or the rows of a file in batches.

    Example:  `blt generate "The history of" --max-new-bytes 300 --temperature 0.7`

    Rows:  `blt generate --jsonl prompts.jsonl --out answers.jsonl --rows 64`
    """
    given = dict(locals())
    from bytelatent.commands.generate import GenerateSettings
    from bytelatent.commands.generate import generate as run

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "valid_utf8", "seed")
    given["sampling"] = {name: given.pop(name) for name in names}
    given["sampling"]["stop"] = stop or []
    run(GenerateSettings.parse(given), sys.stdout.buffer, Console(stderr=True))


def patch(
    text: Annotated[str | None, typer.Argument(help="Text to patch. Default: standard input.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    rule: Annotated[
        str | None,
        typer.Option(help="Patching mode, such as entropy:1.3, space, static:4 or bpe:FILE. Default: the model's."),
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Several patching modes: entropy,space,static:4")] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Read the text in pieces of this many bytes, as training and eval do. Default: as a whole."),
    ] = None,
    entropies: Annotated[bool, typer.Option("--entropies", "-e", help="Show each byte's entropy.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page instead.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show where patches begin in a text, by a BLT, a byte LM, or a patching mode that needs neither.

    Example:  `blt patch "Daenerys Targaryen is in Game of Thrones" --compare entropy,space,static:4`
    """
    from bytelatent.commands.patch import OWN, Rules
    from bytelatent.report import patched_text, write_patches_page

    data = _standard_input() if text is None else text
    names = [name.strip() for name in (compare or rule or OWN).split(",")]
    rules = Rules(model, context)
    patched = rules.patched(names, data)
    for note in rules.notes:
        say(note, sys.stderr)
    if as_json:
        print_json({name: [vars(patch) for patch in patches] for name, patches in patched.items()})
    elif html is not None:
        write_patches_page(html, patched, "Patches", rules.thresholds)
        say(str(html))
    else:
        console = Console()
        for name, patches in patched.items():
            console.print(patched_text(name, patches, entropies))


def _standard_input() -> bytes:
    if sys.stdin.isatty():
        raise UserError("no text: give it as an argument, or pipe it in")
    return sys.stdin.buffer.read()
