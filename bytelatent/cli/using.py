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
from bytelatent.terminal import Console, say


def evaluate(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs.")],
    model: ModelOption = DEFAULT_MODEL,
    entropy: EntropyOption = None,
    max_bytes: Annotated[int | None, typer.Option(callback=bounded(1), help="Stop after so much text.")] = None,
    text_key: TextKeyOption = "text",
    max_bad_rows: MaxBadRowsOption = MAX_BAD_ROWS,
    max_row_bytes: MaxRowBytesOption = MAX_ROW_BYTES,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Bits per byte of a model on text.

    Example:  `blt eval held-out/*.jsonl --model runs/demo`
    """
    from bytelatent.eval import evaluate_model
    from bytelatent.text.damage import must_have_read

    how = text_key, max_bad_rows, max_row_bytes
    result = evaluate_model(model, text, entropy, max_bytes, device, Console(stderr=True), *how)
    if as_json:
        print_json(result)
    else:
        patches = "" if result["mean_patch_bytes"] is None else f"  {result['mean_patch_bytes']:.2f} bytes a patch"
        say(f"{result['bits_per_byte']:.4f} bits per byte on {result['num_bytes']:,} bytes{patches}")
    must_have_read(result["unread"])


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to continue; standard input if neither this nor a file is given.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    file: Annotated[Path | None, typer.Option(help="A file that holds the prompt.")] = None,
    jsonl: Annotated[
        str | None, typer.Option(help='Rows of {"prompt": ...} to continue many at once; - is standard input.')
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new file for the rows of --jsonl; standard output if left out.")
    ] = None,
    max_new_bytes: Annotated[int, typer.Option("--max-new-bytes", "-n")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte.")] = 0.8,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option(help="A share of the likeliest's probability.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, bytes that occurred are less likely.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends it; may be given again. In bash a line break is $'\\n'.")
    ] = None,
    valid_utf8: Annotated[bool, typer.Option("--valid-utf8", help="Only bytes that make valid UTF-8.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    samples: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 1,
    rows: Annotated[int, typer.Option(help="Sequences on their way at once, of --jsonl.")] = 16,
    log_probabilities: Annotated[
        bool, typer.Option("--log-probabilities", help="Tell each byte's in the rows of --jsonl.")
    ] = False,
    entropy: EntropyOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16; auto: as the weights are stored.")] = "auto",
    weights: Annotated[str, typer.Option(help="int8, fp8: large matrices rounded, faster on a GPU; full.")] = "full",
    ahead: Annotated[int, typer.Option(help="Bytes a step, all but one drafted; the same text. 1 drafts none.")] = 1,
) -> None:
    """Continue a text, or the rows of a file many at once.

    Example:  `blt generate "The history of" --max-new-bytes 300 --temperature 0.7`

    Rows:  `blt generate --jsonl prompts.jsonl --out answers.jsonl --rows 64`
    """
    given = dict(locals())
    from bytelatent.generate import GenerateSettings
    from bytelatent.generate import generate as run

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "valid_utf8", "seed")
    given["sampling"] = {name: given.pop(name) for name in names}
    given["sampling"]["stop"] = stop or []
    run(GenerateSettings.parse(given), sys.stdout.buffer, Console(stderr=True))


def patch(
    text: Annotated[str | None, typer.Argument(help="The text; standard input if left out.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    rule: Annotated[
        str | None, typer.Option(help="The model's if left out, or e.g. entropy:1.3, space, static:4, bpe:FILE.")
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Several rules: entropy,space,static:4")] = None,
    context: Annotated[
        int | None, typer.Option(help="Read it in pieces of so many bytes, as training and eval do; whole if left out.")
    ] = None,
    entropies: Annotated[bool, typer.Option("--entropies", "-e", help="Show each byte's entropy.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page instead.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show where patches begin in a text, by a BLT, a byte LM, or a rule that needs neither.

    Example:  `blt patch "Daenerys Targaryen is in Game of Thrones" --compare entropy,space,static:4`
    """
    from bytelatent.patch import OWN, Rules
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
