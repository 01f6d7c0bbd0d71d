"""What SLURM's own commands say about the cluster."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bytelatent.errors import UserError, nearest


class Node(NamedTuple):
    """What a node of a partition has."""

    num_gpus: int
    num_cores: int


class Unreachable(UserError):
    """SLURM does not answer; what was handed to it may have arrived all the same."""


def node_of(partition: str | None) -> Node | None:
    """The node with the most GPUs of a partition, or of the default one; None where there is no SLURM to ask.

    Raises:
        UserError: the cluster has no such partition.
    """
    rows = _asked("sinfo", "%P|%c|%G")
    if not rows:
        return None
    nodes: dict[str, list[Node]] = {}
    default = None
    for name, cores, resources in (row.split("|", 2) for row in rows):
        if name.endswith("*"):
            default = name = name.removesuffix("*")
        gpus = re.findall(r"\bgpu:(?:[^:,()]+:)?([0-9]+)", resources)
        nodes.setdefault(name, []).append(Node(sum(map(int, gpus)), int(cores.removesuffix("+"))))
    wanted = partition or default
    if partition is not None and not set(partition.split(",")) <= nodes.keys():
        wrong = next(name for name in partition.split(",") if name not in nodes)
        known = ", ".join(sorted(nodes))
        raise UserError(
            f"partition: the cluster has no '{wrong}'{nearest(wrong, list(nodes))}; its partitions: {known}"
        )
    found = [node for name in (wanted or "").split(",") for node in nodes.get(name, [])]
    return min(found, key=lambda node: (-node.num_gpus, node.num_cores), default=None)


def submit(script: str, environment: Mapping[str, str] | None = None) -> str:
    """Hand a batch script to SLURM.

    Args:
        environment: what the job finds there beside this process's own; SLURM keeps it for a job that is requeued.

    Returns:
        The job's id.

    Raises:
        Unreachable: SLURM does not answer.
        UserError: it does not take the job.
    """
    variables = {**os.environ, **(environment or {})}
    ended = subprocess.run(["sbatch", "--parsable", script], capture_output=True, text=True, check=False, env=variables)
    if ended.returncode != 0:
        said = ended.stderr.strip() or f"sbatch ended with {ended.returncode}"
        if re.search("contact slurm controller|connect|communication|timed out", said, re.IGNORECASE):
            raise Unreachable(
                f"SLURM cannot be reached: {said}; once it can, {shlex.join(['sbatch', script])} submits this"
            )
        raise UserError(f"SLURM did not take the job: {said}; mend the key and launch it again")
    return ended.stdout.strip().partition(";")[0]  # ID or ID;CLUSTER


def job_of(script: Path) -> str | None:
    """The id of a job that waits or runs and was submitted with this batch script; None if there is none.

    Raises:
        Unreachable: SLURM does not say.
    """
    rows = _asked("squeue", "%i|%o")
    if rows is None:
        raise Unreachable("squeue does not answer")
    for row in rows:
        job, _, command = row.partition("|")
        if command.endswith(f"/{script.name}") and Path(command).resolve() == script.resolve():
            return job
    return None


def is_here() -> bool:
    """Whether jobs can be handed over from this machine."""
    return shutil.which("sbatch") is not None


def _asked(command: str, columns: str) -> list[str] | None:
    """The rows that a command of SLURM's shows; None where there is no answer."""
    try:
        ended = subprocess.run([command, "-h", "-o", columns], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.splitlines() if ended.returncode == 0 else None
