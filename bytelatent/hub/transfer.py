"""Many files of one commit of a repository, downloaded into a folder."""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bytelatent.errors import Interrupted, UserError
from bytelatent.hub.repository import HubFile, Repository, part_of
from bytelatent.log import Console

WORKERS = 8  # files at once


def require_client(what: str, extra: str) -> None:
    """Complain early that the hub's client is not installed.

    Args:
        what: what needs it.
        extra: the extra of this package that brings it.

    Raises:
        UserError: that is so.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UserError(f"'{what}' needs the package huggingface_hub; run: pip install 'bytelatent[{extra}]'") from None


def missing_files(files: Sequence[HubFile], folder: Path) -> list[HubFile]:
    """Those of `files` that are not in `folder` with the listed size; one that is, is taken to be the listed one."""
    return [file for file in files if not _is_whole(folder / file.path, file.size)]


def check_space(files: Sequence[HubFile], folder: Path, what: str, way_out: str) -> None:
    """Complain early that a disk has no room for what is still missing of `files`.

    Args:
        folder: where they are to be; it exists.
        what: what they are, for the message.
        way_out: what to do then.

    Raises:
        UserError: that is so.
    """
    needed = sum(file.size - _size_of_part(folder / file.path) for file in missing_files(files, folder))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"'{folder}' has room for {free / 1e9:.1f} GB, and {what} needs {needed / 1e9:.1f} GB more; {way_out}"
        )


def transfer(
    repository: Repository, commit: str, files: Sequence[HubFile], folder: Path, console: Console, what: str
) -> None:
    """Download what is missing of `files` into `folder`, several at once.

    A call that was stopped, also by a kill, is gone on with by the next one: finished files stay, broken ones are
    transferred from where they broke.

    Args:
        what: what they are, said before the first one.

    Raises:
        UserError: the hub does not answer, or not to this user; a file is not what is listed; the disk is full.
        Interrupted: by Ctrl-C.
    """
    missing = missing_files(files, folder)
    total, left = sum(file.size for file in files), sum(file.size for file in missing)
    console.print(
        f"{what} at {commit[:8]}: {len(files):,} files, {total / 1e9:.2f} GB, {len(missing):,} of them to download",
        highlight=False,
        markup=False,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(repository.name, total=total, completed=total - left)
        advance = partial(progress.advance, task)
        with ThreadPoolExecutor(WORKERS) as pool:
            jobs = [pool.submit(repository.download, file, commit, folder / file.path, advance) for file in missing]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException as error:
                repository.stop.set()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, KeyboardInterrupt):
                    raise Interrupted("the same command goes on from here") from None
                raise


def tell(console: Console, line: str) -> None:
    """Say something in passing, as one line whatever is in it."""
    console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _is_whole(place: Path, size: int) -> bool:
    try:
        return place.is_file() and place.stat().st_size == size
    except OSError:  # a folder that this user may not look into; writing there will say so
        return False


def _size_of_part(place: Path) -> int:
    part = part_of(place)
    return part.stat().st_size if part.is_file() else 0
