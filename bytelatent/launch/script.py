"""The batch script of a job."""

import shlex
from pathlib import Path
from typing import Any

from bytelatent.errors import STOPPED
from bytelatent.launch.settings import LaunchSettings, seconds_of

WARNED = 128 + 10  # ended by SIGUSR1: it came before the process had learnt to answer it

SCRIPT = """\
#!/usr/bin/env bash
{directives}

# `sbatch` of this file starts the job again; training goes on from its last checkpoint.

cd {here} || exit
export DUMP_DIR={dump_dir}
export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}
export PYTHONSAFEPATH=1 # so that the code is the one named above, and not what stands in this folder
{environment}
logs=$DUMP_DIR/logs/$SLURM_JOB_ID

say() {{ echo "$(date +%FT%T) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: $*"; }}

# SLURM tells this shell that the time is nearly over; the script saves and stops. Told again and again, as it may just
# be beginning; each process hears it once.
warn() {{
  if [[ ! $step ]]; then return; fi
  say "told to save and to stop"
  while kill -USR1 "$step"; do sleep 5; done &>/dev/null &
}}
step= signalled= cancelled=
trap 'signalled=yes; warn' USR1 USR2
trap 'signalled=yes; cancelled=yes' TERM # scancel tells the processes by itself

say "begins (restarts: ${{SLURM_RESTART_COUNT:-0}})"
mkdir -p "$logs" || exit
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
{srun} \\
  {command} &
step=$!
if [[ $signalled ]]; then warn; fi # it came before there was anyone to tell

while signalled=; do # a signal ends `wait` early
  wait "$step"
  code=$?
  [[ $signalled ]] || break
done

say "ended with $code; what each process said: $logs"
{ending}
exit "$code"
"""

REQUEUE = """\
case $code in
  {codes}) # stopped because it was asked to
    if [[ ! $cancelled ]]; then
      say "goes back into the queue"
      scontrol requeue "$SLURM_JOB_ID" || say "SLURM does not requeue it; this goes on: sbatch $DUMP_DIR/submit.slurm"
    fi
    ;;
esac"""


def batch_script(settings: LaunchSettings, dump_dir: Path, here: Path, python: str, code: Path, arguments: str) -> str:
    """The text of `submit.slurm`.

    Args:
        settings: resolved: with a name, `ngpu` and `requeue`.
        dump_dir: the job's folder.
        here: the folder that the script runs in.
        python: the interpreter.
        code: the folder that holds the packages.
        arguments: the one argument of the script.
    """
    environment = []
    if settings.ngpu == 0:
        environment.append("export CUDA_VISIBLE_DEVICES= # the CPU, also where there are GPUs")
    if settings.ncpu is not None:
        environment.append(f"export OMP_NUM_THREADS={settings.ncpu}")
    worker = ["-m", "bytelatent.launch.worker", settings.script, arguments]
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
    # A process that fails ends the others, but not before they have had the time to save.
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
        grace = min(grace, seconds_of(settings.time) // 2)  # else a short job would be told to stop as it begins
    asked: dict[str, Any] = {
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
    lines = [f"#SBATCH --{name}={_quoted(str(value))}" for name, value in asked.items() if value is not None]
    return [*lines, f"#SBATCH --{'requeue' if settings.requeue else 'no-requeue'}"]


def _quoted(value: str) -> str:
    """As sbatch reads its directives: it takes quotes away, and a backslash everywhere."""
    if value and all(character.isalnum() or character in "-_./,:@%=+[]" for character in value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
