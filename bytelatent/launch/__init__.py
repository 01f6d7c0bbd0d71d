"""Jobs of a SLURM cluster: a job's folder is written, and submitted.

Its settings and batch script are in `slurm`; `torchrun` and `worker` run inside the job.
"""

import importlib.util
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
from bytelatent.errors import UserError, nearest
from bytelatent.files import explain, whole_file, whole_folder
from bytelatent.launch import slurm
from bytelatent.launch.slurm import LaunchSettings, SlurmUnreachable

__all__ = ["LaunchSettings", "launch", "with_defaults"]

DEFAULT_GPUS = 8  # of a node, if SLURM does not answer
SUBMIT = "submit.slurm"
WRITTEN = (SUBMIT, "config.yaml", "launch.yaml", "code")  # beside logs, which are kept


def launch(settings: LaunchSettings, config: dict[str, Any]) -> str:
    """Write a job's folder and submit it.

    Args:
        settings: as `with_defaults` returns them, with `requeue` and an absolute `dump_dir`.
        config: the resolved settings of the script.

    Returns:
        One line: the job, its log, how to cancel it; after a dry run the command that submits it.

    Raises:
        UserError: SLURM is not installed or rejects the job, or the folder is in use or cannot be written. The folder
            is then as it was.
        SlurmUnreachable: SLURM does not answer; the folder is written.
    """
    assert settings.dump_dir is not None
    dump_dir = Path(settings.dump_dir)
    if not settings.dry_run and shutil.which("sbatch") is None:
        raise UserError(
            "there is no 'sbatch' here; run this where SLURM's commands are, or write the files alone with dry_run=true"
        )
    package_of(settings.script)
    _check_free(dump_dir, settings.override)
    script = dump_dir / SUBMIT
    with _restored_on_failure(dump_dir):
        config, secret = moved_to_environment(config)
        _write_folder(dump_dir, settings, to_yaml(config, {f"${{oc.env:{name}}}" for name in secret}))
        needed = f"needs the addresses with credentials in its environment: {', '.join(secret)}"
        if settings.dry_run:
            return shlex.join(["sbatch", str(script)]) + (f"  # {needed}" if secret else "")
        job = slurm.submit(script, secret)
    log = shlex.quote(str(dump_dir / "logs" / job / "0.out"))
    again = f"; submitting it again {needed}" if secret else ""
    return f"job {job} submitted; tail -F {log}; cancel: scancel {job}{again}"


def _write_folder(dump_dir: Path, settings: LaunchSettings, config: str) -> None:
    (dump_dir / "logs").mkdir(exist_ok=True)
    code = package_of("bytelatent").parent
    if settings.copy_code:
        code = dump_dir / "code"
        copy_code(settings.script, code)
    argument = f"config={dump_dir / 'config.yaml'}"
    script = slurm.batch_script(settings, dump_dir, Path.cwd(), sys.executable, code, argument)
    # The batch script comes last: if it exists, the folder is complete.
    for name, text in (("launch.yaml", settings.to_yaml()), ("config.yaml", config), (SUBMIT, script)):
        with whole_file(dump_dir / name) as aside:
            aside.write_text(text, encoding="utf-8")


@contextmanager
def _restored_on_failure(dump_dir: Path) -> Iterator[None]:
    """Set aside what an earlier launch wrote. If the block fails, restore it and remove what the block wrote.

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
    except SlurmUnreachable:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    except BaseException as error:
        for name in WRITTEN:
            place = dump_dir / name
            if not (aside / name).exists() and name in old:  # the earlier one is still there
                continue
            if place.is_dir():
                shutil.rmtree(place)
            elif place.exists():
                place.unlink()
            if (aside / name).exists():
                os.replace(aside / name, place)
        for folder in new:
            with suppress(OSError):  # it does not exist, or holds other files
                folder.rmdir()
        if isinstance(error, OSError):
            explain(dump_dir, error)
        raise


def with_defaults(settings: LaunchSettings) -> LaunchSettings:
    """The settings with a name, and with the GPUs and cores of a node of the partition, if they were left out.

    Raises:
        UserError: the cluster has no such partition.
    """
    node = slurm.largest_node(settings.partition)
    ngpu, ncpu = settings.ngpu, settings.ncpu
    if ngpu is None:
        ngpu = node.num_gpus if node is not None else DEFAULT_GPUS
    if ncpu is None and node is not None:
        ncpu = max(node.num_cores // ((ngpu and node.num_gpus) or settings.nproc), 1)
    name = settings.name or Path(settings.dump_dir or "").name
    return settings.model_copy(update={"ngpu": ngpu, "ncpu": ncpu, "name": name})


def _check_free(dump_dir: Path, override: bool) -> None:
    """Check that the folder is free: empty, or with `override` without a run and a pending job.

    Raises:
        UserError: it is not.
    """
    if dump_dir.is_dir() and any(dump_dir.iterdir()):
        submit = dump_dir / SUBMIT
        resume = f"{shlex.join(['sbatch', str(submit)])} resumes it; or " if submit.is_file() else ""
        if (dump_dir / "metrics.jsonl").is_file() or (dump_dir / "checkpoints").is_dir():
            raise UserError(f"dump_dir: '{dump_dir}' holds a run; {resume}name another dump_dir")
        if not override:
            raise UserError(
                f"dump_dir: '{dump_dir}' is not empty; {resume}name another dump_dir, or write over it: override=true"
            )
        # A pending job would run what is written now, not what it was submitted with.
        try:
            job = slurm.job_of(submit) if submit.is_file() else None
        except SlurmUnreachable as error:
            raise UserError(
                f"dump_dir: a job of '{dump_dir}' may still be pending, and {error}; name another dump_dir, or "
                "remove this one"
            ) from None
        if job is not None:
            raise UserError(
                f"dump_dir: job {job} of '{dump_dir}' is pending or running; cancel it (scancel {job}), or name "
                "another dump_dir"
            )
    elif dump_dir.exists() and not dump_dir.is_dir():
        raise UserError(f"dump_dir: '{dump_dir}' is a file; name a folder")


def package_of(script: str) -> Path:
    """The folder (or the file) of a module's top-level package.

    Raises:
        UserError: there is no such module.
    """
    top, *inner = script.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise UserError(f"script: there is no module '{script}' here")
    package = Path(spec.origin)
    package = package.parent if package.name == "__init__.py" else package
    place = package.joinpath(*inner)
    if inner and not place.with_suffix(".py").is_file() and not (place / "__main__.py").is_file():
        known = [file.stem for file in place.parent.glob("*.py") if not file.stem.startswith("_")]
        raise UserError(
            f"script: there is no module '{script}'{nearest(inner[-1], known, script.removesuffix(inner[-1]))}"
        )
    return package


def copy_code(script: str, target: Path) -> None:
    """Copy the packages that a job runs, this one and the script's, so that later edits do not change a pending job."""
    with whole_folder(target) as aside:
        for package in {package_of("bytelatent"), package_of(script)}:
            if package.is_dir():
                shutil.copytree(package, aside / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            else:
                shutil.copy2(package, aside / package.name)
