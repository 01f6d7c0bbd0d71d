"""The verbs that use a model on text."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bytelatent.cli.options import DEFAULT_MODEL, DeviceOption, EntropyOption, JsonOption, ModelOption, bounded
from bytelatent.errors import UserError


def evaluate(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs.")],
    model: ModelOption = DEFAULT_MODEL,
    entropy: EntropyOption = None,
    max_bytes: Annotated[int | None, typer.Option(callback=bounded(1), help="Stop after so much text.")] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Bits per byte of a model on text.

    Example:  `blt eval held-out/*.jsonl --model runs/demo`
    """
    from bytelatent.eval import evaluate_model

    result = evaluate_model(model, text, entropy, max_bytes, device, Console(stderr=True))
    if as_json:
        print(json.dumps(result))
        return
    patches = "" if result["mean_patch_bytes"] is None else f"  {result['mean_patch_bytes']:.2f} bytes a patch"
    print(f"{result['bits_per_byte']:.4f} bits per byte on {result['num_bytes']:,} bytes{patches}")


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
    max_new_bytes: Annotated[int, typer.Option("--max-new-bytes", "-n", min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest byte.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    min_p: Annotated[float | None, typer.Option(min=0, max=1, help="A share of the likeliest's probability.")] = None,
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
        str | None, typer.Option(help="The model's if left out, or e.g. space, static:4, bpe:FILE.")
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Several rules: entropy,space,static:4")] = None,
    entropies: Annotated[bool, typer.Option("--entropies", "-e", help="Show each byte's entropy.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page instead.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show where patches begin in a text.

    Example:  `blt patch "Daenerys Targaryen is in Game of Thrones" --compare entropy,space,static:4`
    """
    from bytelatent.patch import Rules
    from bytelatent.report import patched_text, write_patches_page

    data = _standard_input() if text is None else text
    names = [name.strip() for name in (compare or rule or "entropy").split(",")]
    rules = Rules(model)
    patched = {name: rules.patches(name, data) for name in names}
    if as_json:
        print(json.dumps({name: [vars(patch) for patch in patches] for name, patches in patched.items()}))
    elif html is not None:
        write_patches_page(html, patched, "Patches", rules.thresholds)
        print(html)
    else:
        console = Console()
        for name, patches in patched.items():
            console.print(patched_text(name, patches, entropies))


def _standard_input() -> bytes:
    if sys.stdin.isatty():
        raise UserError("no text: give it as an argument, or pipe it in")
    return sys.stdin.buffer.read()
