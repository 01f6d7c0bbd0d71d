"""How fast is `blt prepare`, and within how much memory? Against GNU shuf, and against the disk.

    python benchmarks/shuffle.py --from text.jsonl [--gigabytes 1.5] [--memory 0.512] [--lines long|short] [--rounds 3]

The input is the given JSONL over and over, an id added to each line; with --lines short its text is cut into lines of
about 100 bytes. The floor is the same bytes read and written in order, twice, by large blocks into the same folder. The
programs take turns at going first, and each one's best round counts. Memory is the sum of the proportional set sizes
(shared pages counted once) of all processes, and that of their resident sizes (shared pages counted in each), sampled;
shuf holds the whole input.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from rich.table import Table

from bytelatent.log import Console

BLOCK = 1 << 22
SHORT_TEXT = 60  # characters: a line of about 100 bytes


@dataclass
class Measured:
    """Seconds, and the highest memory seen, in MB: proportional, and resident."""

    seconds: float
    proportional: float = 0.0
    resident: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="JSONL to repeat")
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--memory", type=float, default=0.512, help="GB for blt prepare")
    parser.add_argument("--lines", choices=("long", "short"), default="long")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder if left out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        text = folder / "input.jsonl"
        lines = make_input(given.source, text, int(given.gigabytes * 1e9), given.lines)
        ways: dict[str, Callable[[], Measured]] = {
            "floor": lambda: lower_bound(text, folder),
            "shuf": lambda: shuf(text, folder),
            "blt prepare": lambda: blt_prepare(text, folder, given.memory),
        }
        rounds = [run_all(ways, number) for number in range(given.rounds)]
        show(rounds, text.stat().st_size, lines, given.memory)


def run_all(ways: dict[str, Callable[[], Measured]], number: int) -> dict[str, Measured]:
    """Run all, each time another first: memory that one has just given back is quicker to get than other memory."""
    names = list(ways)
    first = number % len(names)
    measured = {name: ways[name]() for name in names[first:] + names[:first]}
    return {name: measured[name] for name in names}


def make_input(source: Path, text: Path, size: int, lines: str) -> int:
    """Write `size` bytes of JSONL, and return the number of lines."""
    count = written = 0
    with text.open("wb") as file:
        for line in short_lines(source) if lines == "short" else long_lines(source):
            written += file.write(b'{"number": %d, %s' % (count, line.lstrip()[1:]))
            count += 1
            if written >= size:
                return count
    return count


def long_lines(source: Path) -> Iterator[bytes]:
    while True:
        with source.open("rb") as file:
            yield from file


def short_lines(source: Path) -> Iterator[bytes]:
    with source.open("rb") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(2000), strict=False)]
    chance = random.Random(0)
    pieces = [
        (json.dumps({"text": text[i : i + SHORT_TEXT + chance.randrange(-30, 30)]}, ensure_ascii=False) + "\n").encode()
        for text in texts
        for i in range(0, len(text), SHORT_TEXT)
    ]
    yield from cycle(pieces)


def lower_bound(text: Path, folder: Path) -> Measured:
    """Read and write the bytes twice."""
    begin = time.perf_counter()
    copies = [folder / "copy1", folder / "copy2"]
    for source, target in zip([text, copies[0]], copies, strict=True):
        with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as out:
            os.posix_fallocate(out.fileno(), 0, source.stat().st_size)
            while block := file.read(BLOCK):
                out.write(block)
    seconds = time.perf_counter() - begin
    for copy in copies:
        copy.unlink()
    return Measured(seconds)


def shuf(text: Path, folder: Path) -> Measured:
    return watched(["shuf", str(text), "-o", str(folder / "shuffled")], folder / "shuffled")


def blt_prepare(text: Path, folder: Path, memory: float) -> Measured:
    out = folder / "prepared"
    command = [sys.executable, "-m", "bytelatent.cli", "prepare", str(text), "--out", str(out), "--memory", str(memory)]
    return watched(command, out)


def watched(command: list[str], product: Path) -> Measured:
    """Run a command and remove what it made."""
    measured = Measured(0.0)
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        proportional, resident = memory_of(process.pid)
        measured.proportional = max(measured.proportional, proportional / 1e6)
        measured.resident = max(measured.resident, resident / 1e6)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    measured.seconds = time.perf_counter() - begin
    if process.returncode:
        sys.exit(process.stderr.read().decode() if process.stderr else 1)
    shutil.rmtree(product) if product.is_dir() else product.unlink()
    return measured


def memory_of(process: int) -> tuple[int, int]:
    """Bytes of a process and all below it: proportional set size, resident set size."""
    proportional = resident = 0
    with suppress(OSError, ValueError):
        with open(f"/proc/{process}/smaps_rollup", encoding="ascii") as file:
            sizes = {line.split(":")[0]: line.split()[1] for line in file if line.startswith(("Pss:", "Rss:"))}
        proportional, resident = int(sizes["Pss"]) * 1024, int(sizes["Rss"]) * 1024
    with suppress(OSError), open(f"/proc/{process}/task/{process}/children", encoding="ascii") as file:
        for child in file.read().split():
            below = memory_of(int(child))
            proportional, resident = proportional + below[0], resident + below[1]
    return proportional, resident


def show(rounds: list[dict[str, Measured]], size: int, lines: int, memory: float) -> None:
    title = f"{size / 1e9:.2f} GB, {lines:,} lines, --memory {memory:g}, {os.cpu_count()} cores, best of {len(rounds)}"
    table = Table("", "seconds", "all rounds", "/ shuf", "/ floor", "MB (PSS)", "MB (RSS)", title=title)
    best = {way: min(one[way].seconds for one in rounds) for way in rounds[0]}
    for way, seconds in best.items():
        every = [one[way] for one in rounds]
        memories = [max(m.proportional for m in every), max(m.resident for m in every)]
        table.add_row(
            way,
            f"{seconds:.2f}",
            " ".join(f"{m.seconds:.2f}" for m in every),
            f"{seconds / best['shuf']:.2f}",
            f"{seconds / best['floor']:.2f}",
            *(f"{m:,.0f}" if m else "" for m in memories),
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
