"""`prepare`: plan, first pass, order of the output, second pass, manifest; the same call resumes what was stopped."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from bytelatent.credentials import masked
from bytelatent.errors import UserError, need
from bytelatent.files import Locked, only_writer
from bytelatent.prepare.executors import Budget, divide_memory, run_locally, run_on_ray, run_on_slurm
from bytelatent.prepare.plan import (
    FOLDER,
    InputFile,
    PreparePlan,
    PrepareSettings,
    WorkFolder,
    check_first_row,
    differences,
    find_inputs,
    tasks_of,
    units_of,
    writing,
)
from bytelatent.prepare.write import MANIFEST, read_manifest
from bytelatent.text.documents import forget_logged, must_have_read, short

LOGGER = logging.getLogger(__name__)

SHOWN_BAD_ROWS = 3  # of bad rows; the manifest has all


def prepare(settings: PrepareSettings) -> Path:
    """Shuffle all documents of the sources as a whole, within the memory given, and cut them into files of equal size.

    Files of `out`: NAME.chunk.00.jsonl, ...; NAME.val.jsonl; manifest.json, which comes last. The same seed and input
    give the same documents in the same order, whatever the memory and the number of workers. Unfinished work is in
    `out/.prepare`: the same call resumes it.

    Returns:
        The folder. With the executor `slurm` it is filled later.

    Raises:
        UserError: bad input, or a disk or memory that is too small; or, once all else is done, nothing of a file could
            be read.
        Interrupted: Ctrl-C.
    """
    forget_logged()
    out = settings.out.expanduser()
    request = settings.request()
    if (manifest := read_manifest(out)) is not None:
        _check_same(out, manifest, settings)
        shutil.rmtree(out / FOLDER, ignore_errors=True)
        LOGGER.info(f"'{out}' is ready: {_summary(manifest)}")
        must_have_read(manifest["unread"])
        return out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: '{out}' is a file; give a folder")
    need("prepare", "pyarrow", *(["datatrove"] if settings.executor != "local" else []))
    work = WorkFolder(out)
    with _alone(work):
        _plan(settings, request, work)
        if settings.executor == "slurm":
            run_on_slurm(settings, work)
            return out
        if settings.executor == "ray":
            run_on_ray(settings, work)
        else:
            run_locally(work, _budget(settings).workers)
        manifest = read_manifest(out)
        assert manifest is not None
        shutil.rmtree(work.folder, ignore_errors=True)
    places = manifest["corrupt"]["places"]
    for place in places[:SHOWN_BAD_ROWS]:
        LOGGER.info("%s", short(f"left out: {place}"))
    if len(places) > SHOWN_BAD_ROWS:
        LOGGER.info(f"left out: {len(places) - SHOWN_BAD_ROWS:,} more, which '{out / MANIFEST}' names")
    if empty := [output["name"] for output in manifest["outputs"] if not output["documents"]]:
        LOGGER.warning(
            f"{len(empty):,} of {settings.chunks:,} chunks are empty, the first '{empty[0]}': a document is longer "
            "than a chunk; give fewer --chunks, or leave it out"
        )
    LOGGER.info(f"'{out}': {_summary(manifest)}")
    must_have_read(manifest["unread"])
    return out


def _plan(settings: PrepareSettings, request: dict[str, Any], work: WorkFolder) -> None:
    """Resume the saved plan if it is for this request and input; else begin a new one."""
    files = find_inputs(settings.source, work.out)
    budget = _budget(settings)
    try:
        old = work.saved_plan()
    except (OSError, ValueError, KeyError, TypeError):
        old = None
    new = _new_plan(settings, request, files, budget)
    if old is not None and (why := _why_not(old, new)) is None:
        if any(work.folder.glob("scatter/*.marker")):
            LOGGER.info(f"resuming the work in '{work.folder}'")
        return
    if old is not None:
        LOGGER.info(f"starting over: {why}")
    check_first_row(files, settings.text_key)
    with writing(work.out):
        work.clear()
        _check_free(settings, work, files)
        work.begin(new)


def _new_plan(
    settings: PrepareSettings, request: dict[str, Any], files: list[InputFile], budget: Budget
) -> PreparePlan:
    units = units_of(files)
    likely = [unit.size if unit.kind == "lines" else sum(files[i].likely_bytes for i in unit.files) for unit in units]
    tasks = tasks_of(units, likely)
    sizes = {"run_bytes": budget.run_bytes, "range_bytes": budget.range_bytes}
    return PreparePlan(request, files, units, tasks, bits=budget.bits(sum(likely)), memory=settings.memory, **sizes)


def _why_not(old: PreparePlan, new: PreparePlan) -> str | None:
    """Why work for the old plan cannot be used for the new one; None if it can."""
    if differing := differences(old.request, new.request):
        return differing
    if old.files != new.files:
        return "the input has changed"
    if old.memory > new.memory:  # memory measured in bytes varies a little between calls
        return f"there is less memory now, {new.memory:g} GB, than the {old.memory:g} GB the work was begun with"
    sizes = {"memory": 0.0, "bits": 0, "run_bytes": 0, "range_bytes": 0}
    return None if replace(old, **sizes) == replace(new, **sizes) else "it was begun by another version"


def _check_same(out: Path, manifest: dict[str, Any], settings: PrepareSettings) -> None:
    """Refuse a folder that was made from something else."""
    if differing := differences(masked(manifest["request"]), settings.request()):
        raise UserError(f"--out: '{out}' was prepared otherwise: {differing}; give another folder")
    try:
        files = find_inputs(settings.source, out, download=False)
    except UserError:
        return  # the input is gone; what was made from it is here
    then = {(masked(file["file"]), file["bytes"], file["changed"]) for file in manifest["inputs"]}
    new = next((file.path for file in files if (masked(file.path), file.size, file.changed) not in then), None)
    if new is not None:
        raise UserError(f"--out: '{out}' was prepared before '{new}' was added or changed; give another folder")


def _check_free(settings: PrepareSettings, work: WorkFolder, files: list[InputFile]) -> None:
    """Refuse a folder with files of that name, and a disk that is too small: now and not hours later."""
    if found := sorted(
        [*work.out.glob(f"{settings.stem}.chunk.*.jsonl"), *work.out.glob(f"{settings.stem}.val.jsonl")]
    ):
        raise UserError(f"--out: '{found[0]}' is there already, and of other work; give another folder or --name")
    needed = 2 * sum(file.size for file in files if file.kind == "lines")
    free = shutil.disk_usage(work.out).free
    if needed > free:
        raise UserError(
            f"--out: the disk of '{work.out}' has {decimal(free)} left and this takes {decimal(needed)}, "
            "half of it only until it is done; make room or give a folder elsewhere"
        )


def _budget(settings: PrepareSettings) -> Budget:
    if settings.executor == "local":
        # The workers hold these, too: they must be loaded when the memory is measured.
        import pyarrow
        import pyarrow.compute  # noqa: F401

        return divide_memory(settings.memory, settings.workers)
    return divide_memory(settings.memory, 1)


@contextmanager
def _alone(work: WorkFolder) -> Iterator[None]:
    """Keep other processes out of the folder of unfinished work."""
    with ExitStack() as stack:
        try:
            stack.enter_context(only_writer(work.folder))
        except Locked:
            raise UserError(
                f"--out: another process prepares '{work.out}'; wait for it, or give another folder"
            ) from None
        except UserError as error:
            raise UserError(f"--out: {error}; give a folder you may write to") from None
        try:
            yield
        except UserError:
            if {place.name for place in work.folder.iterdir()} <= {".lock"}:  # no work was begun
                shutil.rmtree(work.folder, ignore_errors=True)
                with suppress(OSError):  # there is something else in it
                    work.out.rmdir()
            raise


def _summary(manifest: dict[str, Any]) -> str:
    parts = [
        f"{manifest['documents']:,} documents",
        decimal(manifest["bytes"]),
        f"{len(manifest['outputs'])} files",
    ]
    if manifest["duplicates"]:
        parts.append(f"{manifest['duplicates']:,} duplicates left out")
    if manifest["corrupt"]["rows"]:
        parts.append(f"{manifest['corrupt']['rows']:,} bad rows left out")
    return ", ".join(parts)
