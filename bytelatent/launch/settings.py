"""The settings of a job."""

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from bytelatent.config import Settings


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
