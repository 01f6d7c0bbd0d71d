"""Where the rows of a run's metrics go: always a file of lines; TensorBoard and Weights & Biases if `track` asks."""

import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal, Protocol

from bytelatent.config import Settings, flat
from bytelatent.errors import UserError
from bytelatent.files import explain, own_file, whole_file
from bytelatent.run_folder import row_in

LOGGER = logging.getLogger(__name__)

CONNECT_SECONDS = 30  # for Weights & Biases to answer as a run begins
FINISH_SECONDS = 60  # and to take the last rows as it ends


class WandbSettings(Settings):
    """Where Weights & Biases puts a run.

    Attributes:
        name: of the run; the name of its folder if left out.
        mode: `offline` keeps everything below the run's folder, for `wandb sync`.
    """

    project: str = "bytelatent"
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class Tracker(Protocol):
    def resume_after(self, step: int) -> None:
        """Prepare for the rows after a step, some of which may have been written before; also as a run begins."""
        ...

    def write(self, row: dict[str, Any]) -> None:
        """Write a row: its `step` and other numbers, perhaps nested."""
        ...

    def close(self) -> None: ...


class JsonLines:
    """A row a line, on disk when `write` returns. Where it cannot be, as on a full disk, rows wait until they can.

    Lines that hold no row move to `path.damaged` when the run resumes.
    """

    def __init__(self, path: Path):
        self._path = path
        self._waiting: list[dict[str, Any]] = []
        self._file: Any = None

    def resume_after(self, step: int) -> None:
        self._waiting = [row for row in self._waiting if row["step"] <= step]
        try:
            written = self._path.read_bytes() if self._path.exists() else b""
            kept = self._sorted_out(written.splitlines(keepends=True), step)
            if self._file is not None:
                self._file.close()
            if not written.startswith(kept):
                with whole_file(self._path) as aside:
                    aside.write_bytes(kept)
            self._file = open(self._path, "ab", buffering=0, opener=own_file)  # noqa: SIM115
            self._file.truncate(len(kept))  # which a full disk allows, so that a run can go back there
        except OSError as error:
            explain(self._path, error)

    def _sorted_out(self, lines: list[bytes], step: int) -> bytes:
        """The lines that stay: rows up to a step. Lines without a row are moved, but for one that a crash cut off."""
        rows = [row_in(line) for line in lines]
        strange = [n for n, row in enumerate(rows) if row is None and lines[n].endswith(b"\n") and lines[n].strip()]
        if strange:
            aside = self._path.with_name(f"{self._path.name}.damaged")
            with open(aside, "ab", opener=own_file) as file:
                file.writelines(lines[n] for n in strange)
            numbers = ", ".join(str(n + 1) for n in strange)
            LOGGER.warning(f"'{self._path}': no row of metrics is in line {numbers}; moved to '{aside}'")
        kept = (line for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= step)
        return b"".join(line.rstrip() + b"\n" for line in kept)

    def write(self, row: dict[str, Any]) -> None:
        is_news = not self._waiting
        self._waiting.append(row)
        try:
            self._write_waiting()
        except OSError as error:
            if is_news:
                LOGGER.warning(f"{self._cannot(error)}; its rows wait in memory, and training goes on")

    def _write_waiting(self) -> None:
        while self._waiting:
            line = (json.dumps(self._waiting[0]) + "\n").encode()
            whole = os.fstat(self._file.fileno()).st_size
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(whole)
                raise
            del self._waiting[0]

    def close(self) -> None:
        if self._file is None:
            return
        try:
            self._write_waiting()
            self._file.close()
        except OSError as error:
            if self._waiting:
                first, last = self._waiting[0]["step"], self._waiting[-1]["step"]
                LOGGER.warning(f"{self._cannot(error)}; its rows from step {first} to step {last} are lost")

    def _cannot(self, error: OSError) -> str:
        return f"'{self._path}' cannot be written: {error.strerror or error}"


class TensorBoard:
    """Event files in one folder for all starts of a run; what is written again takes the place of what was there.

    When they cannot be written, a warning says so, and training continues.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None

    def resume_after(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        with self._or_without_it():
            self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        if self._writer is None:
            return
        with self._or_without_it():
            for name, value in numbers(row).items():
                self._writer.add_scalar(name, value, row["step"])
            self._writer.flush()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()

    @contextmanager
    def _or_without_it(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            LOGGER.warning(
                f"'{self._folder}' cannot be written: {error.strerror or error}; training goes on without it"
            )
            self.close()  # half an event may be in the file, and none would be read after it


class WeightsAndBiases:
    """A run of Weights & Biases that resumes where ours does. When it fails, a warning says so; training continues.

    `wandb.id` in the run's folder says which of its runs this is; `wandb/` holds the library's own files.
    """

    def __init__(self, settings: WandbSettings, folder: Path, config: dict[str, Any]):
        self._settings, self._folder, self._config = settings, folder, config
        self._run: Any = None

    def resume_after(self, step: int) -> None:
        if self._run is not None:  # rows that come again are the same points of its curves
            return
        import wandb  # pyright: ignore[reportMissingImports]

        given = {
            "project": self._settings.project,
            "name": self._settings.name or self._folder.resolve().name,
            "id": _run_id(self._folder / "wandb.id", resumes=step > 0),
            "resume": "allow",
            "dir": str(self._folder),
            "config": self._config,
            "settings": wandb.Settings(console="off", silent=True, init_timeout=CONNECT_SECONDS),
        }
        try:
            begun = wandb.init(mode=self._settings.mode, **given)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise UserError(f"wandb: {error} Or set wandb.mode=offline, or leave wandb out of track") from None
        except Exception as error:  # of the network, in many kinds
            LOGGER.warning(f"Weights & Biases cannot be reached ({_in_a_line(error)}); it is used offline")
            self._unless_it_fails(lambda: self._begin(wandb.init(mode="offline", **given)))
        else:
            self._unless_it_fails(lambda: self._begin(begun))

    def _begin(self, run: Any) -> None:
        self._run = run
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        if run.url:
            LOGGER.info(f"Weights & Biases: {run.url}")

    def write(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            self._unless_it_fails(lambda: self._run.log({"step": row["step"], **numbers(row)}))

    def close(self) -> None:
        if (run := self._run) is None:
            return
        finished = Event()

        def finish() -> None:
            with suppress(Exception):
                run.finish()
                finished.set()

        ending = Thread(target=finish, daemon=True)  # it tries for long where the network is gone
        ending.start()
        ending.join(FINISH_SECONDS)
        if not finished.is_set():
            LOGGER.warning(f"Weights & Biases has not taken all rows; later: wandb sync {run.settings.sync_dir}")

    def _unless_it_fails(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            LOGGER.warning(f"Weights & Biases failed ({_in_a_line(error)}); training goes on without it")
            self._run = None


def open_trackers(track: Sequence[str], wandb: WandbSettings, folder: Path, config: dict[str, Any]) -> list[Tracker]:
    """All trackers of a run, the file first.

    Args:
        track: names of those beside the file.
        folder: the run's.
        config: the settings of the run that Weights & Biases shows.
    """
    trackers: list[Tracker] = [JsonLines(folder / "metrics.jsonl")]
    if "tensorboard" in track:
        trackers.append(TensorBoard(folder / "tensorboard"))
    if "wandb" in track:
        trackers.append(WeightsAndBiases(wandb, folder, config))
    return trackers


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a row but for its step, nested ones as `outer/inner`."""
    return {
        name: value
        for name, value in flat(row, between="/").items()
        if isinstance(value, int | float) and math.isfinite(value) and name != "step"
    }


def _run_id(path: Path, resumes: bool) -> str:
    """The id of a run at Weights & Biases; a new one unless the run resumes."""
    if resumes and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    name = secrets.token_hex(4)
    with whole_file(path) as aside:
        aside.write_text(name + "\n", encoding="utf-8")
    return name


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())
