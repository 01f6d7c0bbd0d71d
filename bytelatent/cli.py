"""`blt VERB`: one small function a verb, no logic."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bytelatent.errors import UserError, guarded

app = typer.Typer(
    name="blt",
    help="Byte-level language models with dynamic patches.\n\nExample:  `blt demo`",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(help="Measure this machine.\n\nExample:  `blt bench train demo-blt`", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
DEFAULT_MODEL = "runs/demo"

ModelOption = Annotated[str, typer.Option("--model", "-m", help="A run, or a folder with a model.")]
EntropyOption = Annotated[
    str | None, typer.Option(help="The byte LM (entropy model), if it stands neither inside the model nor beside it.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Of a repository: a branch, a tag or a commit.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(min=0.1, help="About how long it may take.")] = 3.5,
    out: Annotated[Path, typer.Option(help="The folder it writes.")] = Path(DEFAULT_MODEL),
    text: Annotated[str | None, typer.Option(help="Your own text: a file or a folder.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the text.")] = 0,
) -> None:
    """Train a byte LM and a BLT on this machine, measure them, and write a page to look at.

    Example:  `blt demo --minutes 20 --text ~/notes`
    """
    from bytelatent.demo import run_demo

    console = Console()
    summary = run_demo(minutes, out, text, seed, console)
    bits = summary["bits_per_byte"]
    table = Table("", "bits per byte", title="held-out text")
    for name in ("blt", "byte_lm", "xz"):
        table.add_row(name, f"{bits[name]:.3f}")
    console.print(table)
    for label, line in (
        ("look at", out / "report.html"),
        ("numbers", out / "summary.json"),
        ("next", f"blt generate 'def read(self' -m {out}"),
        ("", f"blt patch 'any text' -m {out} --entropies"),
        ("", "blt demo --minutes 20"),
    ):
        console.print(f"[bold]{label:<8}[/] {line}", highlight=False, soft_wrap=True)


@app.command()
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
    text_key: Annotated[str, typer.Option(help="The key or column of the text.")] = "text",
    max_corrupt: Annotated[int, typer.Option(help="Rows to leave out before giving up.")] = 1000,
    workers: Annotated[int | None, typer.Option(help="Processes; one for each core if left out.")] = None,
    executor: Annotated[str, typer.Option(help="local, slurm, ray.")] = "local",
    partition: Annotated[str | None, typer.Option(help="Of the SLURM cluster.")] = None,
    time: Annotated[str, typer.Option(help="Limit of each SLURM job.")] = "24:00:00",
) -> None:
    """Shuffle text of any size as a whole and cut it into files for training; the same command goes on after a stop.

    Example:  `blt prepare text/*.jsonl more.parquet --out data --memory 8 --chunks 32`
    """
    given = dict(locals())
    from bytelatent.prepare import PrepareSettings
    from bytelatent.prepare import prepare as run

    run(PrepareSettings.parse(given), Console(stderr=True))


@app.command(context_settings={"allow_extra_args": False})
def train(
    settings: Annotated[list[str] | None, typer.Argument(help="config=PATH and any number of key=value.")] = None,
) -> None:
    """Train a byte LM or a BLT; the same command goes on with a run that was stopped.

    Example:  `blt train config=apps/bytelatent/configs/byte_lm.yaml run=runs/mine data.train=text/*.jsonl steps=2000`
    """
    from bytelatent.train import command

    command(settings or [])


@app.command()
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
        print(json.dumps(comparison.plain()))
    else:
        comparison.show(Console())


@app.command()
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

    Example:  `blt launch --config apps/bytelatent/configs/blt_1b.yaml --nodes 2 --partition gpu steps=50000`

    Start it again:  `sbatch runs/byte_lm/submit.slurm`
    """
    given = dict(locals())
    from bytelatent.stool import launch_script

    of_script = given.pop("settings") or []
    print(launch_script(given, of_script))


@app.command()
def calibrate(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs; stored entropies are used as they are.")],
    patch_bytes: Annotated[float, typer.Option(help="Mean bytes a patch should hold.")] = 4.5,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The byte LM, for text without entropies.")] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Text to measure on.")] = 1_000_000,
    figure: Annotated[
        Path | None, typer.Option(help="Draw patch size against threshold: a .png, .svg or .pdf.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
) -> None:
    """Find the threshold that gives a wanted patch size, with a byte LM or on stored entropies.

    Example:  `blt calibrate data/entropies/*.chunk.*.parquet --patch-bytes 6 --figure sizes.png`
    """
    from bytelatent.calibrate import calibrate_text

    print(calibrate_text(text, patch_bytes, model, max_bytes, figure, device).model_dump_json(indent=1))


@app.command()
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
    text_key: Annotated[str, typer.Option(help="The key or column that holds the text.")] = "text",
    max_damaged: Annotated[int, typer.Option(min=0, help="Rows without text to leave out before giving up.")] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
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
    summary = entropies_beside(
        text, model, out, starts, rule, context, batch_bytes, text_key, max_damaged, device, dtype, rank, world, console
    )
    print(line_about(summary, out))


@app.command(name="eval")
def evaluate(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs.")],
    model: ModelOption = DEFAULT_MODEL,
    entropy: EntropyOption = None,
    max_bytes: Annotated[int | None, typer.Option(help="Stop after so much text.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
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


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to continue; standard input if neither this nor a file is given.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    file: Annotated[Path | None, typer.Option(help="A file that holds the prompt.")] = None,
    jsonl: Annotated[
        str | None, typer.Option(help='Rows of {"prompt": ...} to continue many at once; - is standard input.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where rows of --jsonl go; standard output if left out.")] = None,
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
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Sequences on their way at once, of --jsonl.")] = 16,
    log_probabilities: Annotated[
        bool, typer.Option("--log-probabilities", help="Tell each byte's in the rows of --jsonl.")
    ] = False,
    entropy: EntropyOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
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


@app.command()
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


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A run, a folder in any known format, or OWNER/NAME on the hub.")],
    target: Annotated[str, typer.Argument(help="The folder it writes.")],
    to: Annotated[str, typer.Option(help="native, hf (transformers), meta (Meta's hub format).")] = "native",
    entropy: EntropyOption = None,
    revision: RevisionOption = None,
    licence: Annotated[
        str | None, typer.Option(help="To state on the model's card; left out: the one it came with.")
    ] = None,
) -> None:
    """Write a model in another format; any size passes through in little memory.

    Example:  `blt convert runs/demo demo-hf --to hf --licence apache-2.0`

    Released weights:  `blt convert facebook/blt-1b blt-1b-hf --to hf`
    """
    from bytelatent.convert import convert_model

    print(convert_model(source, target, to, entropy, revision, licence, Console(stderr=True)))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="The folder of a run.")],
    out: Annotated[str, typer.Option(help="The folder it writes, new or empty.")],
    step: Annotated[int | None, typer.Option(help="Steps done; the last whole checkpoint if left out.")] = None,
) -> None:
    """Write the model of a run's checkpoint, also of one that several processes wrote in parts.

    Example:  `blt export runs/mine --step 5000 --out mine-5000`
    """
    from bytelatent.export import export as run_export

    print(run_export(run, step, out, Console(stderr=True)))


@app.command()
def info(
    model: Annotated[
        str, typer.Argument(help="A preset (blt-1b, blt-8b, entropy, ...), a run, a folder, or OWNER/NAME on the hub.")
    ] = "",
    patch_bytes: Annotated[float, typer.Option(min=1, help="Mean bytes a patch.")] = 4.5,
    context: Annotated[int, typer.Option(min=1, help="Bytes of a document seen at once.")] = 8192,
    entropy: EntropyOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a model's shape, parameters and FLOPs per byte, part by part; weights are not read.

    Example:  `blt info blt-1b --patch-bytes 6`
    """
    from bytelatent.info import describe

    description = describe(model, patch_bytes, context, entropy, revision)
    if as_json:
        print(json.dumps(description.plain()))
    else:
        description.show(Console())


@bench_app.command("train")
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
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
        print(json.dumps(report.plain()))
    else:
        report.show(Console())


def main() -> None:
    """The command `blt`."""
    guarded(app)


def _standard_input() -> bytes:
    if sys.stdin.isatty():
        raise UserError("no text: give it as an argument, or pipe it in")
    return sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
