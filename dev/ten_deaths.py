"""Ten deaths of a run under SLURM, and the same losses.

python dev/ten_deaths.py --out /tmp/deaths --seed 0

A small BLT is trained by a SLURM job of two processes, undisturbed. A second job with the same settings is ended again
and again at random moments, in the ways that clusters have, and submitted again, or waits in the queue, where it puts
itself after a warning, until SLURM begins it again (minutes). The program prints each death and
compares the runs: the metrics of every step, the final weights and the optimizer's state, bit for bit. Exit code 1:
something differs, or a death went otherwise than it should.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from same_bits import differences, metrics

from bytelatent.run_folder import NoCheckpoint, newest_checkpoint

STEPS, SAVE_EVERY, VALIDATE_EVERY = 110, 3, 8
PATIENCE = 400  # seconds for whatever is waited for
STACK = {"dim": 32, "num_layers": 1, "num_heads": 2, "multiple_of": 16}


@dataclass
class Death:
    kind: str
    step: int = 0  # the last one in the metrics when it struck
    saved: int = 0  # that of the newest whole checkpoint afterwards
    resumed: int = 0  # that after which the metrics go on
    notes: str = ""


class Job:
    """A run's folder and the SLURM job that trains it now."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.id = ""
        self.ends = 0  # of jobs with this number

    def launch(self, config: Path) -> None:
        asked = [f"config={config}", f"dump_dir={self.folder}", "nodes=1", "ngpu=0", "nproc=2", "ncpu=1", "time=60"]
        said = output(sys.executable, "-m", "bytelatent.stool", "script=bytelatent.train", *asked)
        self.id = said.split()[1]

    def launch_again(self) -> None:
        self.id, self.ends = output("sbatch", "--parsable", str(self.folder / "submit.slurm")).strip(), 0

    def state(self) -> str:
        """PENDING, RUNNING, ...; empty once SLURM has forgotten it."""
        asked = subprocess.run(["squeue", "-h", "-j", self.id, "-o", "%T"], capture_output=True, text=True, check=False)
        return asked.stdout.strip()

    def lines(self) -> list[str]:
        metrics = self.folder / "metrics.jsonl"
        text = metrics.read_text() if metrics.is_file() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def processes(self) -> dict[str, int]:
        """The process of each rank, under its number, and that of torchrun."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
                environment = (place / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if f"config={self.folder / 'config.yaml'}" not in words or words[0].endswith("srun"):
                continue
            own = [word.removeprefix("RANK=") for word in environment if word.startswith("RANK=")]
            found["torchrun" if "bytelatent.launch.torchrun" in words else own[0] if own else ""] = int(place.name)
        return found

    def wait_for(self, happened: Callable[[], object], what: str, pause: float = 0.02) -> None:
        until = time.monotonic() + PATIENCE
        while not happened():
            if time.monotonic() > until:
                sys.exit(f"job {self.id}: waited for {PATIENCE} s in vain for {what}; its logs: {self.folder / 'logs'}")
            time.sleep(pause)

    def wait_for_end(self) -> str:
        """Wait until nothing of the job runs; the state that SLURM left it in."""
        self.wait_for(
            lambda: self.state() not in ("RUNNING", "COMPLETING", "CONFIGURING") and not self.processes(),
            "its end",
            0.5,
        )
        return self.state()

    def log(self) -> str:
        log = self.folder / "logs" / f"{self.id}.out"
        return log.read_text() if log.is_file() else ""


# Ways to die. Each is called when the run has come to the step that chance chose, and returns when it has struck.


def rank_killed(job: Job, draw: random.Random) -> str:
    rank = draw.choice("01")
    os.kill(job.processes()[rank], signal.SIGKILL)
    return f"rank {rank}"


def launcher_killed(job: Job, draw: random.Random) -> str:
    os.kill(job.processes()["torchrun"], signal.SIGKILL)
    return ""


def cancelled(job: Job, draw: random.Random) -> str:
    output("scancel", job.id)
    return ""


def warned(job: Job, draw: random.Random) -> str:
    output("scancel", "--signal=USR1", "--batch", job.id)
    return ""


def killed_while_saving(job: Job, draw: random.Random) -> str:
    rank = draw.choice("01")
    process = job.processes()[rank]
    job.wait_for(lambda: unfinished(job), "a checkpoint being written", 0.0005)
    os.kill(process, signal.SIGKILL)
    return f"rank {rank}"


def cut_while_saving(job: Job, draw: random.Random) -> str:
    """Half of the weights and moments that a rank is writing are lost, and its writers with it."""
    processes, cut = job.processes(), ""

    def cuts() -> str:
        nonlocal cut
        files = [file for folder in unfinished(job) for file in folder.rglob("*.distcp")]
        with suppress(OSError, ValueError):  # it may be whole by now, and have another name
            largest = max(files, key=lambda file: file.stat().st_size)
            if size := largest.stat().st_size:
                os.truncate(largest, size // 2)
                cut = f"{largest.name} of {size} bytes"
        return cut

    job.wait_for(cuts, "a file being written", 0.0005)
    for process in processes.values():
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return cut


def checkpoint_cut(job: Job, draw: random.Random) -> str:
    """Killed, and the newest checkpoint turns out to have lost the half of its largest file."""
    job.wait_for(lambda: len(whole(job)) > 1, "a second checkpoint")
    for process in job.processes().values():
        os.kill(process, signal.SIGKILL)
    job.wait_for(lambda: not job.processes(), "its processes' end")
    newest = whole(job)[-1]
    largest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    return f"{newest.name}/{largest.relative_to(newest)}"


def stopped_in_validation(job: Job, draw: random.Random) -> str:
    rank = draw.choice("01")
    process = job.processes()[rank]

    def validates() -> bool:
        row = json.loads(job.lines()[-1])
        return "bits_per_byte" in row and row["step"] % VALIDATE_EVERY == 0

    job.wait_for(validates, "a validation", 0.002)
    os.kill(process, signal.SIGTERM)
    return f"rank {rank}"


KINDS: list[tuple[str, Callable[[Job, random.Random], str]]] = [
    ("SIGKILL to one rank", rank_killed),
    ("scancel", cancelled),
    ("SIGKILL to torchrun", launcher_killed),
    ("SIGUSR1 to the job", warned),
    ("SIGKILL while saving", killed_while_saving),
    ("SIGKILL to all, newest checkpoint cut", checkpoint_cut),
    ("SIGTERM in validation", stopped_in_validation),
    ("SIGKILL to all while saving, a file cut", cut_while_saving),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for both runs, which nodes see")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--deaths", type=int, default=10)
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    config = write_config(out)

    undisturbed = Job(out / "undisturbed")
    undisturbed.launch(config)
    show(f"job {undisturbed.id}: undisturbed")
    undisturbed.wait_for(lambda: undisturbed.state() == "" or ended(undisturbed), "its end", 0.5)
    undisturbed.wait_for_end()

    job = Job(out / "disturbed")
    job.launch(config)
    deaths = die(job, arguments.deaths, random.Random(arguments.seed))
    print(table(deaths))
    wrong = differences(undisturbed.folder, job.folder)
    if metrics(undisturbed.folder)[-1]["step"] != STEPS:
        wrong.append(f"the undisturbed run did not come to step {STEPS}")
    wrong += [f"death {number}: {death.notes}" for number, death in enumerate(deaths, 1) if "?" in death.notes]
    for line in wrong:
        print(line)
    if wrong:
        sys.exit(1)
    print(
        f"{len(deaths)} deaths; metrics of {STEPS} steps, final weights and optimizer state are the same, bit for bit"
    )


def die(job: Job, times: int, draw: random.Random) -> list[Death]:
    """Let the job come to its end, with so many deaths on the way."""
    moments = sorted(draw.sample(range(SAVE_EVERY + 1, STEPS - VALIDATE_EVERY - 2 * SAVE_EVERY), times))
    deaths: list[Death] = []
    before: list[str] = []  # the metrics when it died last
    for number, moment in enumerate(moments):
        kind, strike = KINDS[number % len(KINDS)]
        job.wait_for(partial(has_come_to, moment, job, before), f"step {moment}")
        death = Death(kind)
        if deaths:
            deaths[-1].resumed = step_begun_from(job)
        death.notes = strike(job, draw)
        death.step = last_step(job)
        after = job.wait_for_end()
        death.notes += after_death(job, after, kind)
        before = job.lines()
        try:
            death.saved = int(newest_checkpoint(job.checkpoints.parent)[0].name.removeprefix("step-"))
        except NoCheckpoint:
            death.saved = 0
        deaths.append(death)
        show(f"job {job.id}: {kind}, step {death.step}, checkpoint {death.saved}, {death.notes}")
        if after == "PENDING":
            job.ends = ends_of(job)
        else:
            job.launch_again()
    job.wait_for(lambda: ended(job), f"step {STEPS}", 0.5)
    job.wait_for_end()
    if deaths:
        deaths[-1].resumed = step_begun_from(job)
    for death in deaths:
        if death.resumed != death.saved:
            death.notes += f", went on from {death.resumed} and not from {death.saved}?"
    return deaths


def after_death(job: Job, state: str, kind: str) -> str:
    """What became of the job."""
    requeued = state == "PENDING"
    code = job.log().rpartition("ended with ")[2].partition(";")[0] if ended(job) else "none"
    left = f", {len(unfinished(job))} unfinished folder left" if unfinished(job) else ""
    should = kind in ("SIGUSR1 to the job", "SIGTERM in validation")
    return f" code {code}{', requeued' if requeued else ''}{left}{'' if requeued == should else ', requeued?'}"


def ended(job: Job) -> bool:
    return ends_of(job) > job.ends


def ends_of(job: Job) -> int:
    return job.log().count("ended with")


def has_come_to(step: int, job: Job, before: list[str]) -> bool:
    """Whether the metrics say so, and hold a row that was not there when the run died last."""
    now = job.lines()
    return (len(now) > len(before) or now != before[: len(now)]) and last_step(job) >= step


def last_step(job: Job) -> int:
    lines = job.lines()
    return json.loads(lines[-1])["step"] if lines else 0


def step_begun_from(job: Job) -> int:
    """The step after which the process that wrote last went on: its first row has no speed."""
    rows = [json.loads(line) for line in job.lines()]
    first = next(row for row in reversed(rows) if "bits_per_byte" in row and row["bytes_per_second"] is None)
    return first["step"] - 1


def whole(job: Job) -> list[Path]:
    return sorted(job.checkpoints.glob("step-*"))


def unfinished(job: Job) -> list[Path]:
    return list(job.checkpoints.glob(".step-*"))


def table(deaths: list[Death]) -> str:
    lines = ["| | death | struck at step | went on from | |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {n} | {d.kind} | {d.step} | {d.resumed} | {d.notes.strip()} |" for n, d in enumerate(deaths, 1)]
    return "\n".join(lines)


def write_config(out: Path) -> Path:
    """A small BLT and its text."""
    out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(500)]
    for name, documents in (("train", 1000), ("valid", 60)):
        rows = [{"text": " ".join(draw.choices(words, k=60)) + "."} for _ in range(documents)]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "steps": STEPS,
        "model": {
            "kind": "blt",
            "encoder": {**STACK, "window": 64},
            "global_transformer": {**STACK, "dim": 64},
            "decoder": {**STACK, "window": 64},
            "cross_attention": {"k": 2, "num_heads": 2},
            "ngram_hash": {"sizes": [3, 4], "vocab_size": 1009},
        },
        "patching": {"mode": "space"},
        "data": {
            "train": str(out / "train.jsonl"),
            "valid": str(out / "valid.jsonl"),
            "context": 256,
            "batch_bytes": 2048,
            "shuffle_buffer": 16,
        },
        "optimizer": {"lr": 3e-3, "warmup_steps": 5},
        "validation": {"every": VALIDATE_EVERY},
        "checkpoint": {"every": SAVE_EVERY, "keep": 3},
        "log_every": 1,
        "device": "cpu",
        "dtype": "float32",
    }
    config = out / "config.yaml"
    config.write_text(json.dumps(settings, indent=1))  # JSON is YAML
    return config


def output(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        sys.exit(f"{' '.join(command)}: {ended.stderr.strip() or ended.returncode}")
    return ended.stdout


def show(line: str) -> None:
    print(f"{time.strftime('%T')} {line}", flush=True)


if __name__ == "__main__":
    main()
