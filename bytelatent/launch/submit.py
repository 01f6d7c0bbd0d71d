"""A job's folder, written and handed to SLURM."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bytelatent.config import to_yaml
from bytelatent.credentials import moved_to_environment
from bytelatent.errors import UserError
from bytelatent.files import explain, whole_file
from bytelatent.launch import cluster
from bytelatent.launch.code import copy_code, package_of
from bytelatent.launch.script import batch_script
from bytelatent.launch.settings import LaunchSettings

GPUS = 8  # of a node where no cluster can be asked
SUBMIT = "submit.slurm"
WRITTEN = (SUBMIT, "config.yaml", "launch.yaml", "code")  # beside logs, which stay


def launch(settings: LaunchSettings, config: dict[str, Any]) -> str:
    """Write a job's folder and submit it.

    Args:
        settings: as `filled_in` gives them, with `dump_dir`, an absolute path, and `requeue`.
        config: the resolved settings of the script.

    Returns:
        One line: the job, where to look, how to cancel; after a dry run the command that submits.

    Raises:
        UserError: there is no SLURM, it does not take the job, or the folder is taken or cannot be written; the folder
            is then as it was.
        Unreachable: SLURM does not answer; the folder is written.
    """
    assert settings.dump_dir is not None
    dump_dir = Path(settings.dump_dir)
    if not settings.dry_run and not cluster.is_here():
        raise UserError(
            "there is no 'sbatch' here; run this where SLURM's commands are, or write the files alone with dry_run=true"
        )
    package_of(settings.script)
    _must_be_free(dump_dir, settings.override)
    submit = dump_dir / SUBMIT
    with _as_it_was_on_failure(dump_dir):
        config, secret = moved_to_environment(config)
        _write_folder(dump_dir, settings, to_yaml(config, {f"${{oc.env:{name}}}" for name in secret}))
        needed = f"needs the addresses with credentials in its environment: {', '.join(secret)}"
        if settings.dry_run:
            return shlex.join(["sbatch", str(submit)]) + (f"  # {needed}" if secret else "")
        job = cluster.submit(str(submit), secret)
    log = shlex.quote(str(dump_dir / "logs" / job / "0.out"))
    again = f"; submitting it again {needed}" if secret else ""
    return f"job {job} submitted; tail -F {log}; cancel: scancel {job}{again}"


def _write_folder(dump_dir: Path, settings: LaunchSettings, config: str) -> None:
    (dump_dir / "logs").mkdir(exist_ok=True)
    code = package_of("bytelatent").parent
    if settings.copy_code:
        code = dump_dir / "code"
        copy_code(settings.script, code)
    _write(dump_dir / "launch.yaml", settings.to_yaml())
    _write(dump_dir / "config.yaml", config)
    argument = f"config={dump_dir / 'config.yaml'}"
    # The batch script comes last: where it stands, the folder is complete.
    _write(dump_dir / SUBMIT, batch_script(settings, dump_dir, Path.cwd(), sys.executable, code, argument))


@contextmanager
def _as_it_was_on_failure(dump_dir: Path) -> Iterator[None]:
    """What an earlier launch wrote is set aside, and comes back if the block fails; what the block wrote goes then.

    Not if SLURM does not answer: the job may be in its queue.
    """
    aside = dump_dir / f".{os.getpid()}.before"
    new = [folder for folder in (aside, dump_dir / "logs", dump_dir) if not folder.exists()]
    old = [name for name in WRITTEN if (dump_dir / name).exists()]
    try:
        aside.mkdir(parents=True)
        for name in old:
            os.replace(dump_dir / name, aside / name)
        yield
        shutil.rmtree(aside, ignore_errors=True)
    except cluster.Unreachable:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    except BaseException as error:
        for name in WRITTEN:
            if (aside / name).exists() or name not in old:  # else it is still the old one
                _remove(dump_dir / name)
            if (aside / name).exists():
                os.replace(aside / name, dump_dir / name)
        for folder in new:
            with suppress(OSError):  # it was not made, or somebody else's files are in it
                folder.rmdir()
        if isinstance(error, OSError):
            explain(dump_dir, error)
        raise


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    elif place.exists():
        place.unlink()


def filled_in(settings: LaunchSettings) -> LaunchSettings:
    """The settings with what was left out: a name, and what a node of the partition has.

    Raises:
        UserError: the cluster has no such partition.
    """
    node = cluster.node_of(settings.partition)
    ngpu, ncpu = settings.ngpu, settings.ncpu
    if ngpu is None:
        ngpu = node.num_gpus if node is not None else GPUS
    if ncpu is None and node is not None:
        ncpu = max(node.num_cores // ((ngpu and node.num_gpus) or settings.nproc), 1)
    name = settings.name or Path(settings.dump_dir or "").name
    return settings.model_copy(update={"ngpu": ngpu, "ncpu": ncpu, "name": name})


def _must_be_free(dump_dir: Path, override: bool) -> None:
    """Complain where the folder is taken: without `override` if anything is in it, with it if a run or a job is."""
    if dump_dir.is_dir() and any(dump_dir.iterdir()):
        submit = dump_dir / SUBMIT
        goes_on = f"{shlex.join(['sbatch', str(submit)])} goes on with it; or " if submit.is_file() else ""
        if (dump_dir / "metrics.jsonl").is_file() or (dump_dir / "checkpoints").is_dir():
            raise UserError(f"dump_dir: '{dump_dir}' holds a run; {goes_on}name another dump_dir")
        if not override:
            raise UserError(
                f"dump_dir: '{dump_dir}' is not empty; {goes_on}name another dump_dir, or write over it: override=true"
            )
        if submit.is_file():
            _no_job_must_be_in(dump_dir)
    elif dump_dir.exists() and not dump_dir.is_dir():
        raise UserError(f"dump_dir: '{dump_dir}' is a file; name a folder")


def _no_job_must_be_in(dump_dir: Path) -> None:
    """A job that waits would run what is written now, and not what it was submitted with."""
    try:
        job = cluster.job_of(dump_dir / SUBMIT)
    except cluster.Unreachable as error:
        raise UserError(
            f"dump_dir: a job of '{dump_dir}' may still wait, and {error}; name another dump_dir, or remove this one"
        ) from None
    if job is not None:
        raise UserError(
            f"dump_dir: job {job} of '{dump_dir}' waits or runs; cancel it (scancel {job}), or name another dump_dir"
        )


def _write(path: Path, text: str) -> None:
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
