"""What `scale.py correct` does: runs of the trainer with the same text in each step, and their losses side by side.

Each step is of `BATCHES` batches, the same for any number of ranks: only for that the trainer's loader is replaced.
Started as a program, this file is one rank of such a run.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scale_plans import MIDDLE, TINY

from bytelatent import log
from bytelatent.commands import train
from bytelatent.data import Batch, Loader
from bytelatent.errors import UserError, guarded
from bytelatent.patching import PatchSettings
from bytelatent.run_folder import read_metrics
from bytelatent.text import find_files, read_documents
from bytelatent.text.stored import Stored, stored_writer
from bytelatent.training import trainer as loop

BATCHES = 8  # in a step, over all ranks
NEAR = 4  # times what bfloat16 changes of one GPU's loss is as near as many GPUs should come to it
# What the made-up starts are said to come from: those of the mode entropy are what can be stored.
PATCHING = PatchSettings(mode="entropy", threshold=1.0)
COMPARED = ("step", "bits_per_byte", "gradient_norm")


class Dealt:
    """In place of the trainer's loader: each step's batches come from one rank's, and are dealt to all."""

    def __init__(self, data: Any, seed: int, patcher: Any, rank: int, world: int, *of_damage: Any):
        self.inner = Loader(data, seed, patcher, 0, 1, *of_damage)
        self.rank, self.world = rank, world
        self.own: list[Batch] = []
        self.backwards = os.environ.get("SCALE_ORDER") == "backwards"

    def __enter__(self) -> "Dealt":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.inner.close()

    def __next__(self) -> Batch:
        if not self.own:
            of_step = [next(self.inner) for _ in range(BATCHES)]
            self.own = of_step[self.rank :: self.world]
            if not self.backwards:
                self.own.reverse()
        return self.own.pop()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()  # the same on all ranks, as a step is over

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def redistribute(self, states: list[dict[str, Any]]) -> str:
        self.load_state_dict(states[0])
        return f"data: the position of {len(states)} ranks is that of {self.world}"


def one_rank(arguments: list[str]) -> None:
    """Train as `python -m bytelatent.train` does.

    The last rank is killed after `SCALE_KILL` steps, unless torchrun has begun again.
    """
    loop.Loader = Dealt  # pyright: ignore[reportAttributeAccessIssue]
    fatal = int(os.environ.get("SCALE_KILL", "-1"))
    rank, world = (int(os.environ.get(name, value)) for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")))
    inner = loop.learning_rate

    def rate(step: int, *more: Any) -> float:
        if step == fatal and rank == world - 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(step, *more)

    loop.learning_rate = rate
    log.configure()
    train.main(arguments)


@dataclass
class Job:
    """One run, under way or over."""

    name: str
    run: Path
    process: subprocess.Popen[bytes]
    log: Path
    began: float
    seconds: float = 0.0

    def rows(self) -> list[dict[str, Any]]:
        """What each step gave that does not depend on the clock."""
        rows = read_metrics(self.run / "metrics.jsonl")
        return [{key: row[key] for key in COMPARED} for row in rows if "bits_per_byte" in row]

    def wait(self, until: float) -> None:
        """Until it ends, or is ended at a time."""
        try:
            self.process.wait(max(until - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # torchrun and what it started: a session of their own
            self.process.wait()
        self.seconds = time.monotonic() - self.began
        how = "" if self.process.returncode == 0 else f", FAILED with {self.process.returncode}"
        show(f"{self.name}: {self.seconds:.0f} s, {len(self.rows())} steps{how}")
        if self.process.returncode != 0:
            show("\n".join(f"    {line}" for line in self.log.read_text(errors="replace").splitlines()[-25:]))

    @property
    def failed(self) -> bool:
        return self.process.returncode != 0


class Jobs:
    """Starts runs that differ in what a test says, and in nothing else."""

    def __init__(self, out: Path, settings: dict[str, Any], cards: Sequence[str]):
        self.out, self.settings, self.cards = out, settings, cards

    def start(
        self, name: str, world: int, first_card: int = 0, environment: dict[str, str] | None = None, **more: Any
    ) -> Job:
        """Start a run in the folder `name`, on cards from the given one on; `more` are settings."""
        run, log = self.out / name, self.out / f"{name}.log"
        of_step = {"optimizer.accumulation": BATCHES // world}
        given = {**self.settings, **of_step, "run": str(run), **more}
        own = [str(Path(__file__).resolve()), *(f"{key}={json.dumps(value)}" for key, value in given.items())]
        launcher = [sys.executable]
        if world > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
            launcher += ["--max-restarts", "1", "--monitor-interval", "0.5"]
        where = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1", **(environment or {})}
        if self.cards:
            where["CUDA_VISIBLE_DEVICES"] = ",".join(self.cards[first_card : first_card + world])
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*launcher, *own], env=where, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        return Job(name, run, process, log, time.monotonic())


def correct(
    gpus: int | None,
    plans: Sequence[str],
    text: Path | None,
    out: Path,
    steps: int,
    minutes: float,
    tiny: bool,
    determinism: bool,
) -> None:
    """Run and compare; exit code 1 where something is not as it should be."""
    cards = [] if tiny else cards_here()
    world = gpus or (2 if tiny else len(cards))
    if world < 2 or BATCHES % world or (cards and len(cards) < world):
        raise UserError(f"--gpus: {world} will not do; take 2, 4 or 8 of the {len(cards)} that are here")
    if out.exists():
        raise UserError(f"'{out}' is there already; remove it, or name another folder: --out FOLDER")
    out.mkdir(parents=True)
    stored = store(text, out / "text.parquet", steps, tiny)
    half = steps // 2
    jobs = Jobs(out, {**run_settings(stored, steps, tiny), "determinism": determinism}, cards)
    until = time.monotonic() + 60 * minutes

    # One card has room for several of these runs, and they are compared, not timed.
    one = jobs.start("one", 1)
    backwards = jobs.start("backwards", 1, first_card=1, environment={"SCALE_ORDER": "backwards"})
    exact = jobs.start("float32", 1, dtype="float32", first_card=1)
    first, *others = [jobs.start(plan, world, **plan_settings(plan, world)) for plan in plans]
    for job in (one, backwards, exact, first, *others):
        job.wait(until)

    killed = jobs.start(
        "killed",
        world,
        environment={"SCALE_KILL": str(half + steps // 5)},
        **plan_settings(plans[0], world),
    )
    resumed = None
    if not first.failed:
        copy_until(first.run, out / "resumed", half)
        resumed = jobs.start("resumed", world // 2, **plan_settings(plans[0], world // 2))
    for job in (killed, resumed):
        if job is not None:
            job.wait(until)

    show(f"\nlosses of {steps} steps, {BATCHES} batches each; bfloat16 where nothing else is said")
    show(HEAD)
    show("| --- | --- | --- | --- |")
    noise = differ("one GPU, the batches of a step in another order, against one GPU", backwards, one)
    rounding = differ("one GPU in float32 against one GPU", exact, one)
    good = noise is not None and rounding is not None
    for plan, job in zip(plans, (first, *others), strict=True):
        found = differ(f"{world} GPUs, {plan}, against one GPU", job, one)
        good &= found is not None and rounding is not None and found <= NEAR * rounding
    if resumed is not None:
        found = differ(
            f"{world // 2} from the checkpoint of {world} after step {half}, against {world}", resumed, first
        )
        good &= found is not None and rounding is not None and found <= NEAR * rounding
    good &= repeated(killed, first, world)
    near = f"within {NEAR} times what bfloat16 changes of one GPU, and bit for bit where nothing differs"
    show(f"all of it {near}" if good else f"NOT all of it {near}")
    if not good:
        sys.exit(1)


HEAD = "| runs | largest relative difference of a loss | at step | of the last 10 steps' mean |"


def differ(what: str, job: Job, other: Job) -> float | None:
    """Print how far the losses of two runs are apart, and return it; None where one has not come to its end."""
    mine, theirs = ({row["step"]: row["bits_per_byte"] for row in each.rows()} for each in (job, other))
    if job.failed or other.failed or mine.keys() != theirs.keys():
        show(f"| {what} | not to be compared | | |")
        return None
    apart = {step: abs(mine[step] - theirs[step]) / theirs[step] for step in mine}
    step = max(apart, key=lambda step: apart[step])
    last = sorted(mine)[-10:]
    ends = [sum(losses[step] for step in last) for losses in (mine, theirs)]
    show(f"| {what} | {apart[step]:.2e} | {step} | {abs(ends[0] - ends[1]) / ends[1]:.2e} |")
    return apart[step]


def repeated(killed: Job, first: Job, world: int) -> bool:
    """Print whether a run whose rank was killed is the other one bit for bit, as it is where both are deterministic."""
    log = killed.log.read_text(errors="replace")
    if killed.failed or first.failed:
        show("a rank killed: no run to compare")
        return False
    rows, others = killed.rows(), first.rows()
    wrong = [row["step"] for row, other in zip(rows, others, strict=False) if row != other]
    weights, same = (next((job.run / "checkpoints").glob("step-*/model.safetensors")) for job in (killed, first))
    is_same = not wrong and len(rows) == len(others) and weights.read_bytes() == same.read_bytes()
    restarts = log.count("Signal 9") or log.count("exitcode: -9") or log.count("exitcode -9")
    show(
        f"rank {world - 1} of {world} killed by SIGKILL ({'seen' if restarts else 'NOT seen'} in the log), the run "
        "begun again, against the one without: losses, gradient norms and final weights "
        + ("the same, bit for bit" if is_same else f"DIFFER, from step {wrong[0] if wrong else 'none'} on")
    )
    return is_same and bool(restarts)


def copy_until(run: Path, copy: Path, step: int) -> None:
    """A run as it was at an earlier checkpoint."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(".lock"))
    for folder in (copy / "checkpoints").iterdir():
        if folder.name != f"step-{step:08d}":
            shutil.rmtree(folder)


def plan_settings(plan: str, world: int) -> dict[str, Any]:
    if plan == "rows":
        return {"optimizer.hash_gradients": "rows"}
    if world == 1:
        return {}
    if plan == "tensor":
        return {"parallel.tensor": world, "optimizer.accumulation": BATCHES}
    return {"parallel.data": plan}


def run_settings(text: Path, steps: int, tiny: bool) -> dict[str, Any]:
    batch = 256 if tiny else 4096
    return {
        "steps": steps,
        "model": (TINY if tiny else MIDDLE).plain(),
        "patching": PATCHING.plain(),
        "data": {"train": str(text), "context": batch, "batch_bytes": batch, "batch_patches": batch // 2},
        "optimizer.lr": 1e-3,
        "optimizer.warmup_steps": steps // 10,
        "checkpoint": {"every": steps // 4, "keep": 4},
        "faults.watchdog_minutes": 4,
        "log_every": 1,
        "device": "cpu" if tiny else "cuda",
        "dtype": "bfloat16",
    }


def store(text: Path | None, out: Path, steps: int, tiny: bool) -> Path:
    """Text, given or random, with patch starts stored beside it, those of words; more than the steps read."""
    wanted = 2 * steps * BATCHES * (256 if tiny else 4096)
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(2000)]

    def documents() -> Any:
        if text is None:
            while True:
                yield " ".join(draw.choices(words, k=draw.randint(20, 500))).encode()
        for file in find_files(str(text)):
            for _, document in read_documents(file, "text"):
                yield document.text

    about = Stored(byte_lm="none", context=8192, dtype="float32", patching=PATCHING.plain())
    written = 0
    with stored_writer(out, about) as writer:
        for number, document in enumerate(documents()):
            ids = np.frombuffer(document, dtype=np.uint8)
            writer.add(str(number), document, np.concatenate([[True], ids == ord(" ")]))
            written += len(document)
            if written >= wanted:
                break
    return out


def cards_here() -> list[str]:
    """The names of the cards that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]


def show(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    guarded(lambda: one_rank(sys.argv[1:]))
