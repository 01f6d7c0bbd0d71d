"""Do two builds of this package give the same outputs?

    git archive COMMIT bytelatent | tar -x -C /tmp/before
    python dev/same_outputs.py /tmp/before .

Runs the verbs of both builds on the same text, one thread and small models (about four minutes on two cores), then lets
the second build read and resume what the first one wrote. Compares prepared files, stored entropies, metrics,
weights and optimizer states bit for bit, exports tensor by tensor and key by key (model cards apart), and the JSON that
verbs print. Prints a line for each difference; exit code 1: there are some. Options have the names of the first build.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from same_bits import differences

CLOCK = {
    "README.md",
    "seconds",
    "bytes_per_second",
    "created",
    "date",
    "time",
    "command",
    "version",
    "bytelatent_version",
    "log",
}
BYTE_LM = """\
steps: 40
seed: 0
model: {kind: byte_lm, dim: 32, num_layers: 2, num_heads: 2, window: 64}
data: {train: DATA/*.chunk.*.jsonl, valid: DATA/*.val.jsonl, context: 256, batch_bytes: 1024}
optimizer: {lr: 4.0e-3, warmup_steps: 5}
validation: {every: 20, max_bytes: 20000}
checkpoint: {every: 20}
determinism: true
device: cpu
"""
BLT = BYTE_LM.replace(
    "model: {kind: byte_lm, dim: 32, num_layers: 2, num_heads: 2, window: 64}", "model: {preset: demo-blt}"
).replace(
    "device: cpu",
    "device: cpu\nbyte_lm: WORK/byte_lm\npatching: {mode: entropy}\ncalibration: {patch_bytes: 4.5, text_bytes: 20000}",
)


class Build:
    """One build of the package, run in a folder of its own."""

    def __init__(self, tree: Path, work: Path):
        self.tree, self.work = tree.resolve(), work
        work.mkdir(parents=True)

    def blt(self, *arguments: str) -> str:
        """Run a verb in this build's folder; its standard output."""
        command = [sys.executable, "-P", "-m", "bytelatent", *arguments]
        environment = os.environ | {"PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.tree}: blt {' '.join(arguments)}\n{done.stderr}")
        return done.stdout


def write_text(path: Path) -> None:
    """Documents from the sources of Python's own modules."""
    modules = sorted(Path(json.__file__).parents[1].glob("*.py"))[:80]
    with path.open("w", encoding="utf-8") as file:
        for module in modules:
            text = module.read_text(encoding="utf-8")
            for begin in range(0, min(len(text), 20_000), 2_000):
                file.write(json.dumps({"text": text[begin : begin + 2_000]}) + "\n")


def make_all(build: Build, text: Path) -> dict[str, str]:
    """Run the verbs; what each printed."""
    build.blt("prepare", str(text), "--out", "data", "--chunks", "2", "--memory", "0.5", "--dedup")
    for name, settings in (("byte_lm", BYTE_LM), ("blt", BLT)):
        config = settings.replace("DATA", "data").replace("WORK", ".")
        (build.work / f"{name}.yaml").write_text(config)
        build.blt("train", f"config={name}.yaml", f"run={name}")
    held_out = next(str(path.relative_to(build.work)) for path in (build.work / "data").glob("*.val.jsonl"))
    build.blt("entropies", held_out, "--model", "byte_lm", "--out", "entropies")
    build.blt("entropies", held_out, "--model", "byte_lm", "--out", "starts", "--rule", "threshold=2.5")
    for name in ("hf", "meta"):
        build.blt("convert", "blt", f"export-{name}", "--to", name)
    build.blt("convert", "export-meta", "export-native")
    rows = [{"prompt": f"def name_{i}("} for i in range(5)]
    (build.work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_all(build, held_out)


def read_all(build: Build, held_out: str) -> dict[str, str]:
    """What verbs print that only read."""
    commands = {
        "calibrate": ["calibrate", held_out, "--model", "byte_lm", "--patch-bytes", "6"],
        "calibrate on entropies": ["calibrate", "entropies"],
        "eval": ["eval", held_out, "--model", "blt", "--json"],
        "eval of a byte LM": ["eval", held_out, "--model", "byte_lm", "--json"],
        "eval of exports": ["eval", held_out, "--model", "export-native", "--json", "--max-bytes", "5000"],
        "patch": ["patch", "class Error(ValueError): pass", "--model", "blt", "--json", "-e"],
        "patch by rules": [
            "patch",
            "class Error(ValueError): pass",
            "--model",
            "blt",
            "--json",
            "--compare",
            "space,static:4",
        ],
        "generate": ["generate", "import ", "--model", "blt", "-n", "60", "--temperature", "0"],
        "generate with sampling": ["generate", "import ", "-m", "blt", "-n", "60", "--top-p", "0.9", "--samples", "2"],
        "generate int8": ["generate", "import ", "-m", "export-native", "-n", "40", "--weights", "int8"],
        "generate ahead": ["generate", "import ", "-m", "blt", "-n", "40", "--temperature", "0", "--ahead", "4"],
        "generate rows": ["generate", "--jsonl", "rows.jsonl", "-m", "blt", "-n", "30", "--rows", "2", "--top-k", "5"],
        "info": ["info", "blt", "--json"],
    }
    return {name: build.blt(*command) for name, command in commands.items()}


def plain(text: str) -> Any:
    """The JSON of an output without what the clock and the place decide; or its text."""
    try:
        return without_clock([json.loads(line) for line in text.splitlines() if line])
    except ValueError:
        return text


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clock(inner) for key, inner in value.items() if key not in CLOCK}
    return [without_clock(inner) for inner in value] if isinstance(value, list) else value


def differing_files(one: Path, other: Path) -> list[str]:
    """Files of two folders that differ, by what they hold."""
    names = {str(path.relative_to(folder)) for folder in (one, other) for path in folder.rglob("*") if path.is_file()}
    found = []
    for name in sorted(name for name in names if not name.endswith("complete.json")):  # sizes and digests of the others
        a, b = one / name, other / name
        if not a.exists() or not b.exists():
            found.append(f"{name} is only in {one if a.exists() else other}")
        elif name.endswith(".safetensors"):
            tensors, others = load_file(a), load_file(b)
            same = tensors.keys() == others.keys() and all(torch.equal(tensors[k], others[k]) for k in tensors)
            found += [] if same else [f"{name}: tensors differ"]
        elif name.endswith(".parquet"):
            table, its = pq.read_table(a), pq.read_table(b)
            found += [] if table.equals(its) else [f"{name}: tables differ"]
        elif name.endswith(".json"):
            values, its = (without_clock(json.loads(path.read_text())) for path in (a, b))
            found += [] if values == its else [f"{name}: {values} and {its}"]
        elif name.endswith((".jsonl", ".pth")):
            found += [] if a.read_bytes() == b.read_bytes() else [f"{name}: bytes differ"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        write_text(text)
        before, after = (Build(tree, Path(folder) / name / "w") for name, tree in vars(given).items())
        printed, its = make_all(before, text), make_all(after, text)
        found = [
            f"{name}: {printed[name]!r} and {its[name]!r}" for name in its if plain(printed[name]) != plain(its[name])
        ]
        for name in ("data", "entropies", "starts", "export-hf", "export-meta", "export-native"):
            found += [f"{name}/{line}" for line in differing_files(before.work / name, after.work / name)]
        for run in ("byte_lm", "blt"):
            found += [f"{run}: {line}" for line in differences(before.work / run, after.work / run)]

        both = Build(given.after, Path(folder) / "both" / "w")  # the second build on the files of the first
        shutil.copytree(before.work, both.work, dirs_exist_ok=True)
        held_out = next(str(path.relative_to(both.work)) for path in (both.work / "data").glob("*.val.jsonl"))
        for name, output in read_all(both, held_out).items():
            if plain(output) != plain(printed[name]):
                found.append(f"{name}, of files of the first build: {printed[name]!r} and {output!r}")
        for build in (before, both):
            build.blt("train", "config=blt.yaml", "run=blt", "steps=60")
        found += [f"resumed: {line}" for line in differences(before.work / "blt", both.work / "blt")]
    for line in found:
        print(line)
    if found:
        sys.exit(1)
    print(f"{len(printed)} verbs, 6 folders, 2 runs and a resumed run are the same")


if __name__ == "__main__":
    main()
