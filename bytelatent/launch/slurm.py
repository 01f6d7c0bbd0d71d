"""The settings of a SLURM job, its batch script, and the commands of the cluster."""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from bytelatent.config import Settings
from bytelatent.errors import STOPPED, UserError, nearest

UNREACHABLE = re.compile("contact slurm controller|connect|communication|timed out", re.IGNORECASE)
WARNED = 128 + 10  # exit code of a process that SIGUSR1 ended, because it did not handle the signal yet

MASTER = '--master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"'
SAME_NAMES = ("mem", "time", "partition", "account", "qos", "constraint", "exclude")  # of settings and of directives

SCRIPT = """\
#!/usr/bin/env bash
{directives}

# `sbatch` of this file starts the job again; training resumes from its last checkpoint.

cd {here} || exit
export DUMP_DIR={dump_dir}
export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}
export PYTHONSAFEPATH=1 # import the code named above, not what is in this folder
{environment}
logs=$DUMP_DIR/logs/$SLURM_JOB_ID

say() {{ echo "$(date +%FT%T) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: $*"; }}

# SLURM signals this shell when the time is nearly over; the script saves and stops. The signal is sent again and again,
# because the script may just be starting; each process reacts once.
warn() {{
  if [[ ! $step ]]; then return; fi
  say "asked to save and to stop"
  while kill -USR1 "$step"; do sleep 5; done &>/dev/null &
}}
step= signalled= cancelled=
trap 'signalled=yes; warn' USR1 USR2
trap 'signalled=yes; cancelled=yes' TERM # scancel signals the processes itself

say "begins (restarts: ${{SLURM_RESTART_COUNT:-0}})"
mkdir -p "$logs" || exit
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
{srun} \\
  {command} &
step=$!
if [[ $signalled ]]; then warn; fi # the signal came before the step began

while signalled=; do # a signal ends `wait` early
  wait "$step"
  code=$?
  [[ $signalled ]] || break
done

say "ended with $code; output of each process: $logs"
{ending}
exit "$code"
"""

REQUEUE = """\
case $code in
  {codes}) # it stopped on request
    if [[ ! $cancelled ]]; then
      say "returns to the queue"
      scontrol requeue "$SLURM_JOB_ID" || say "SLURM does not requeue it; resume with: sbatch $DUMP_DIR/submit.slurm"
    fi
    ;;
esac"""


class LaunchSettings(Settings):
    """A job.

    Attributes:
        script: module to run. It takes config=PATH.
        config: configuration of the script: a file, or a name that `blt configs` lists.
        name: name of the job. Default: the last part of --dump-dir.
        dump_dir: folder of the job. Default: `run` of the config, else runs/NAME.
        nodes: number of nodes.
        ngpu: GPUs per node, with one process each. 0 uses the CPU. Default: all GPUs.
        nproc: processes per node on the CPU, with --ngpu 0.
        ncpu: CPU cores per process. Default: an even share.
        mem: memory per node, such as 64G. 0 uses all of it.
        time: time limit: minutes, 12:00:00 or 2-00:00:00.
        partition: SLURM partition. `sinfo` lists them.
        account: SLURM account to charge.
        qos: SLURM quality of service.
        constraint: features that the nodes must have, as for sbatch --constraint.
        exclude: nodes to exclude.
        launcher: how processes start: torchrun (one per node, by srun) or srun (one per process).
        grace: seconds before the time limit at which the job receives the signal to save and stop.
        requeue: requeue a job that was stopped. Default: for training only.
        copy_code: run a copy of the present code.
        override: overwrite an earlier launch that has no run.
        dry_run: write all files, but do not submit the job.
    """

    script: str = "bytelatent.train"
    config: str | None = None
    name: str | None = Field(default=None, min_length=1)
    dump_dir: str | None = Field(default=None, min_length=1)
    nodes: int = Field(default=1, ge=1, le=10**5)
    ngpu: int | None = Field(default=None, ge=0, le=1024)
    nproc: int = Field(default=1, ge=1, le=1024)
    ncpu: int | None = Field(default=None, ge=1, le=10**5)
    mem: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    launcher: Literal["torchrun", "srun"] = "torchrun"
    grace: int = Field(default=120, ge=1, le=10**6)
    requeue: bool | None = None
    copy_code: bool = True
    override: bool = False
    dry_run: bool = False

    @field_validator("*")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.isprintable():
            raise ValueError(f"{value!r} holds a line break or another character that a script cannot hold")
        return value

    @field_validator("script")
    @classmethod
    def _module(cls, script: str) -> str:
        if not all(part.isidentifier() for part in script.split(".")):
            raise ValueError(f"'{script}' is no module; write it as in script=bytelatent.train")
        return script

    @field_validator("mem")
    @classmethod
    def _memory(cls, mem: str | None) -> str | None:
        if mem is not None and not re.fullmatch(r"\d+[KMGTkmgt]?B?", mem):
            raise ValueError(f"'{mem}' is no memory; write 64G, or 0 for all of a node")
        return mem

    @field_validator("time")
    @classmethod
    def _limit(cls, time: str | None) -> str | None:
        if time is not None:
            time_limit_seconds(time)
        return time

    @field_validator("dump_dir")
    @classmethod
    def _path(cls, dump_dir: str | None) -> str | None:
        # In the names of logs '%' and '\' mean something to SLURM, and ':' separates the folders of PYTHONPATH.
        if dump_dir is not None and (wrong := next((c for c in "%\\:" if c in dump_dir), None)):
            raise ValueError(f"'{dump_dir}' holds '{wrong}', which a job cannot have in its folder's name")
        return dump_dir

    @model_validator(mode="after")
    def _processes(self) -> Self:
        if self.nproc > 1 and self.ngpu != 0:
            raise ValueError(f"nproc={self.nproc} is for CPUs; add ngpu=0, or leave it out: each GPU has a process")
        return self

    @property
    def processes(self) -> int:
        """Processes of a node."""
        return self.ngpu or self.nproc


def time_limit_seconds(time: str) -> int:
    """A time limit in seconds.

    Args:
        time: in one of SLURM's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        ValueError: it has none of these forms, or is zero.
    """
    if not re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", time):
        raise ValueError(f"'{time}' is no time limit; write minutes, 12:00:00 or 2-00:00:00")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    # After days come hours; without days a single number is minutes, and two are minutes and seconds.
    first = 3600 if dash or len(parts) == 3 else 60
    seconds = 86400 * int(days or 0) + sum(part * first // 60**place for place, part in enumerate(parts))
    if seconds == 0:
        raise ValueError(f"'{time}' is no time at all; leave it out for the partition's own limit")
    return seconds


class SlurmNode(NamedTuple):
    """What a node of a partition has."""

    num_gpus: int
    num_cores: int


class SlurmUnreachable(UserError):
    """SLURM does not answer. A job that was submitted may have arrived all the same."""


def largest_node(partition: str | None) -> SlurmNode | None:
    """The node with the most GPUs of a partition, or of the default one; None if SLURM does not answer.

    Raises:
        UserError: the cluster has no such partition.
    """
    rows = _query("sinfo", "%P|%c|%G")
    if not rows:
        return None
    nodes: dict[str, list[SlurmNode]] = {}
    wanted = partition.split(",") if partition else []
    for name, cores, resources in (row.split("|", 2) for row in rows):
        if not partition and name.endswith("*"):  # the default
            wanted = [name.removesuffix("*")]
        gpus = re.findall(r"\bgpu:(?:[^:,()]+:)?([0-9]+)", resources)
        node = SlurmNode(sum(map(int, gpus)), int(cores.removesuffix("+")))
        nodes.setdefault(name.removesuffix("*"), []).append(node)
    if unknown := [name for name in wanted if name not in nodes]:
        known = ", ".join(sorted(nodes))
        raise UserError(
            f"partition: the cluster has no '{unknown[0]}'{nearest(unknown[0], list(nodes))}; its partitions: {known}"
        )
    found = [node for name in wanted for node in nodes[name]]
    return min(found, key=lambda node: (-node.num_gpus, node.num_cores), default=None)


def submit(script: Path, environment: Mapping[str, str]) -> str:
    """Submit a batch script.

    Args:
        environment: more variables for the job; SLURM keeps them for a job that is requeued.

    Returns:
        The job's id.

    Raises:
        SlurmUnreachable: SLURM does not answer.
        UserError: it rejects the job.
    """
    command = ["sbatch", "--parsable", str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if ended.returncode != 0:
        reason = ended.stderr.strip() or f"sbatch ended with {ended.returncode}"
        if UNREACHABLE.search(reason):
            retry = shlex.join(["sbatch", str(script)])
            raise SlurmUnreachable(f"SLURM cannot be reached: {reason}; once it can, {retry} submits this")
        raise UserError(f"SLURM did not take the job: {reason}; correct the key and launch it again")
    return ended.stdout.strip().partition(";")[0]  # ID or ID;CLUSTER


def job_of(script: Path) -> str | None:
    """The id of a pending or running job that was submitted with this batch script; None without one.

    Raises:
        SlurmUnreachable: SLURM does not answer.
    """
    rows = _query("squeue", "%i|%o")
    if rows is None:
        raise SlurmUnreachable("squeue does not answer")
    for row in rows:
        job, _, command = row.partition("|")
        if command.endswith(f"/{script.name}") and Path(command).resolve() == script.resolve():
            return job
    return None


def _query(command: str, columns: str) -> list[str] | None:
    """The rows that a command of SLURM prints; None if it fails."""
    try:
        ended = subprocess.run([command, "-h", "-o", columns], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.splitlines() if ended.returncode == 0 else None


def batch_script(settings: LaunchSettings, dump_dir: Path, here: Path, python: str, code: Path, argument: str) -> str:
    """The text of `submit.slurm`.

    Args:
        settings: complete: with a name, `ngpu` and `requeue`.
        dump_dir: the job's folder.
        here: the folder in which the job runs.
        python: the interpreter.
        code: the folder of the packages.
        argument: of the script.
    """
    environment = []
    if settings.ngpu == 0:
        environment.append("export CUDA_VISIBLE_DEVICES= # use the CPU, even if there are GPUs")
    if settings.ncpu is not None:
        environment.append(f"export OMP_NUM_THREADS={settings.ncpu}")
    worker = ["-m", "bytelatent.launch.worker", settings.script, argument]
    if settings.launcher == "srun":
        command = shlex.join([python, "-u", *worker])
    else:
        command = shlex.join([python, "-m", "bytelatent.launch.torchrun"]) + f" --nproc-per-node={settings.processes} "
        command += "--standalone" if settings.nodes == 1 else f"--nnodes={settings.nodes} {MASTER}"
        command += " \\\n  " + shlex.join(worker)
    tasks = settings.processes if settings.launcher == "srun" else 1
    cores = settings.ncpu and settings.ncpu * settings.processes // tasks
    srun = f"srun --nodes={settings.nodes} --ntasks-per-node={tasks}" + (f" --cpus-per-task={cores}" if cores else "")
    # A process that fails ends the others, but only after they had time to save.
    srun += f" --kill-on-bad-exit=0 --wait={settings.grace} --label"
    return SCRIPT.format(
        directives="\n".join(_directives(settings, dump_dir, tasks, cores)),
        here=shlex.quote(str(here)),
        dump_dir=shlex.quote(str(dump_dir)),
        code=shlex.quote(str(code)),
        environment="\n".join(environment),
        srun=srun,
        command=command,
        ending=REQUEUE.format(codes=f"{STOPPED}|{WARNED}") if settings.requeue else "",
    )


def _directives(settings: LaunchSettings, dump_dir: Path, tasks: int, cores: int | None) -> list[str]:
    grace = settings.grace
    if settings.time is not None:
        # Otherwise a short job would be asked to stop as it begins.
        grace = min(grace, time_limit_seconds(settings.time) // 2)
    options: dict[str, Any] = {
        "job-name": settings.name,
        "output": dump_dir / "logs" / "%j.out",
        "open-mode": "append",
        "nodes": settings.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": cores,
        "gres": f"gpu:{settings.ngpu}" if settings.ngpu else None,
    }
    options |= {name: getattr(settings, name) for name in SAME_NAMES} | {"signal": f"B:USR1@{grace}"}
    lines = [f"#SBATCH --{name}={_quoted(str(value))}" for name, value in options.items() if value is not None]
    return [*lines, f"#SBATCH --{'requeue' if settings.requeue else 'no-requeue'}"]


def _quoted(value: str) -> str:
    """Quote a value for a directive, from which sbatch removes quotes and backslashes."""
    if value and all(character.isalnum() or character in "-_./,:@%=+[]" for character in value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
