"""SLURM: what its commands say about the cluster, and the batch script of a job."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bytelatent.errors import STOPPED, UserError, nearest
from bytelatent.launch.settings import LaunchSettings, time_limit_seconds

UNREACHABLE = re.compile("contact slurm controller|connect|communication|timed out", re.IGNORECASE)
WARNED = 128 + 10  # exit code of a process that SIGUSR1 ended, because it did not handle the signal yet

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


class SlurmNode(NamedTuple):
    """What a node of a partition has."""

    num_gpus: int
    num_cores: int


class SlurmUnreachable(UserError):
    """SLURM does not answer. A job that was submitted may have arrived all the same."""


def is_installed() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def largest_node(partition: str | None) -> SlurmNode | None:
    """The node with the most GPUs of a partition, or of the default one; None if SLURM does not answer.

    Raises:
        UserError: the cluster has no such partition.
    """
    rows = _query("sinfo", "%P|%c|%G")
    if not rows:
        return None
    nodes: dict[str, list[SlurmNode]] = {}
    default = None
    for name, cores, resources in (row.split("|", 2) for row in rows):
        if name.endswith("*"):
            default = name = name.removesuffix("*")
        gpus = re.findall(r"\bgpu:(?:[^:,()]+:)?([0-9]+)", resources)
        nodes.setdefault(name, []).append(SlurmNode(sum(map(int, gpus)), int(cores.removesuffix("+"))))
    wanted = (partition or default or "").split(",")
    if partition is not None and (unknown := [name for name in wanted if name not in nodes]):
        known = ", ".join(sorted(nodes))
        raise UserError(
            f"partition: the cluster has no '{unknown[0]}'{nearest(unknown[0], list(nodes))}; its partitions: {known}"
        )
    found = [node for name in wanted for node in nodes.get(name, [])]
    return min(found, key=lambda node: (-node.num_gpus, node.num_cores), default=None)


def submit(script: Path, environment: Mapping[str, str]) -> str:
    """Submit a batch script.

    Args:
        environment: variables for the job beside this process's own; SLURM keeps them for a job that is requeued.

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
    """The id of a pending or running job that was submitted with this batch script; None if there is none.

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
        tasks = settings.processes
        command = shlex.join([python, "-u", *worker])
    else:
        tasks = 1
        command = shlex.join([python, "-m", "bytelatent.launch.torchrun"]) + f" --nproc-per-node={settings.processes} "
        if settings.nodes == 1:
            command += "--standalone"
        else:
            command += f'--nnodes={settings.nodes} --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"'
        command += " \\\n  " + shlex.join(worker)
    srun = f"srun --nodes={settings.nodes} --ntasks-per-node={tasks}"
    if settings.ncpu is not None:
        srun += f" --cpus-per-task={settings.ncpu * settings.processes // tasks}"
    # A process that fails ends the others, but only after they had time to save.
    srun += f" --kill-on-bad-exit=0 --wait={settings.grace} --label"
    return SCRIPT.format(
        directives="\n".join(_directives(settings, dump_dir, tasks)),
        here=shlex.quote(str(here)),
        dump_dir=shlex.quote(str(dump_dir)),
        code=shlex.quote(str(code)),
        environment="\n".join(environment),
        srun=srun,
        command=command,
        ending=REQUEUE.format(codes=f"{STOPPED}|{WARNED}") if settings.requeue else "",
    )


def _directives(settings: LaunchSettings, dump_dir: Path, tasks: int) -> list[str]:
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
        "cpus-per-task": settings.ncpu and settings.ncpu * settings.processes // tasks,
        "gres": f"gpu:{settings.ngpu}" if settings.ngpu else None,
        "mem": settings.mem,
        "time": settings.time,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "exclude": settings.exclude,
        "signal": f"B:USR1@{grace}",
    }
    lines = [f"#SBATCH --{name}={_quoted(str(value))}" for name, value in options.items() if value is not None]
    return [*lines, f"#SBATCH --{'requeue' if settings.requeue else 'no-requeue'}"]


def _quoted(value: str) -> str:
    """Quote a value for a directive, from which sbatch removes quotes and backslashes."""
    if value and all(character.isalnum() or character in "-_./,:@%=+[]" for character in value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
