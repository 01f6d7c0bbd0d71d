"""A job's folder, written and handed to SLURM."""

import shlex
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bytelatent.errors import UserError
from bytelatent.files import whole_file
from bytelatent.launch import cluster
from bytelatent.launch.code import copy_code, package_of
from bytelatent.launch.script import batch_script
from bytelatent.launch.settings import LaunchSettings

GPUS = 8  # of a node where no cluster can be asked


def launch(settings: LaunchSettings, config: dict[str, Any]) -> str:
    """Write a job's folder and submit it.

    Args:
        settings: with `dump_dir`, an absolute path, and `requeue`.
        config: the resolved settings of the script.

    Returns:
        One line: the job, where to look, how to cancel; after a dry run the command that submits.

    Raises:
        UserError: there is no SLURM, it does not take the job, or the folder is taken.
    """
    assert settings.dump_dir is not None
    assert settings.requeue is not None
    dump_dir = Path(settings.dump_dir)
    if not settings.dry_run and not cluster.is_here():
        raise UserError(
            "there is no 'sbatch' here; run this where SLURM's commands are, or write the files alone with dry_run=true"
        )
    package_of(settings.script)
    settings = _filled_in(settings)
    _must_be_free(dump_dir, settings.override)
    submit = dump_dir / "submit.slurm"
    submit_command = shlex.join(["sbatch", str(submit)])
    # The batch script comes last: where it stands, the folder is complete.
    with whole_file(submit) as aside:
        (dump_dir / "logs").mkdir(exist_ok=True)
        code = package_of("bytelatent").parent
        if settings.copy_code:
            code = dump_dir / "code"
            copy_code(settings.script, code)
        _write(dump_dir / "launch.yaml", settings.to_yaml())
        _write(dump_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        argument = f"config={dump_dir / 'config.yaml'}"
        aside.write_text(batch_script(settings, dump_dir, Path.cwd(), sys.executable, code, argument), "utf-8")
    if settings.dry_run:
        return submit_command
    job = cluster.submit(str(submit))
    log = shlex.quote(str(dump_dir / "logs" / job / "0.out"))
    return f"job {job} submitted; tail -F {log}; cancel: scancel {job}"


def _filled_in(settings: LaunchSettings) -> LaunchSettings:
    """The settings with what was left out: a name, and what a node of the partition has."""
    node = cluster.node_of(settings.partition)
    ngpu, ncpu = settings.ngpu, settings.ncpu
    if ngpu is None:
        ngpu = node.num_gpus if node is not None else GPUS
    if ncpu is None and node is not None:
        ncpu = max(node.num_cores // ((ngpu and node.num_gpus) or settings.nproc), 1)
    name = settings.name or Path(settings.dump_dir or "").name
    return settings.model_copy(update={"ngpu": ngpu, "ncpu": ncpu, "name": name})


def _must_be_free(dump_dir: Path, override: bool) -> None:
    """Complain where the folder is taken: without `override` if anything is in it, with it if a run is."""
    if dump_dir.is_dir() and any(dump_dir.iterdir()):
        submit = dump_dir / "submit.slurm"
        goes_on = f"{shlex.join(['sbatch', str(submit)])} goes on with it; or " if submit.is_file() else ""
        if (dump_dir / "metrics.jsonl").is_file() or (dump_dir / "checkpoints").is_dir():
            raise UserError(f"dump_dir: '{dump_dir}' holds a run; {goes_on}name another dump_dir")
        if not override:
            raise UserError(
                f"dump_dir: '{dump_dir}' is not empty; {goes_on}name another dump_dir, or write over it: override=true"
            )
    elif dump_dir.exists() and not dump_dir.is_dir():
        raise UserError(f"dump_dir: '{dump_dir}' is a file; name a folder")


def _write(path: Path, text: str) -> None:
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
