"""Metrics of a run: rows for a file, TensorBoard and Weights & Biases, and a bar or lines on the terminal."""

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple, Protocol, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bytelatent import log
from bytelatent.config import flat
from bytelatent.device import peak_memory
from bytelatent.errors import UserError, in_one_line
from bytelatent.files import explain, own_file, whole_file
from bytelatent.model import ModelSettings
from bytelatent.model.flops import training_flops
from bytelatent.model.settings import NAMES
from bytelatent.progress import EVERY, time_left
from bytelatent.run_folder import row_in
from bytelatent.training.checkpoint.manager import TrainState
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.settings import WandbSettings

LOGGER = logging.getLogger(__name__)

CONNECT_SECONDS = 30  # for Weights & Biases to answer as a run begins
FINISH_SECONDS = 60  # and to take the last rows as it ends


class Tracker(Protocol):
    def resume_after(self, step: int) -> None:
        """Prepare for the rows after a step, some of which may have been written before; also as a run begins."""
        ...

    def write(self, row: dict[str, Any]) -> None:
        """Write a row: its `step` and other numbers, perhaps nested."""
        ...

    def close(self) -> None: ...


class JsonLines:
    """One row per line, on disk when `write` returns. Where it cannot be, as on a full disk, rows wait until they can.

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
            rows = self._sorted_out(written.splitlines(keepends=True), step)
            if self._file is not None:
                self._file.close()
            if not written.startswith(rows):
                with whole_file(self._path) as aside:
                    aside.write_bytes(rows)
            self._file = open(self._path, "ab", buffering=0, opener=own_file)  # noqa: SIM115
            self._file.truncate(len(rows))  # which a full disk allows, so that a run can go back there
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
        found = (line for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= step)
        return b"".join(line.rstrip() + b"\n" for line in found)

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

    When they cannot be written, a warning is logged, and training continues.
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
    """A run of Weights & Biases that resumes where ours does. When it fails, a warning is logged; training continues.

    `wandb.id` in the run's folder holds the id of the run there; `wandb/` holds the library's own files.
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
            LOGGER.warning(f"Weights & Biases cannot be reached ({in_one_line(error)}); it is used offline")
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
            LOGGER.warning(f"Weights & Biases failed ({in_one_line(error)}); training goes on without it")
            self._run = None


def open_trackers(track: Sequence[str], wandb: WandbSettings, folder: Path, config: dict[str, Any]) -> list[Tracker]:
    """All trackers of a run, the file first. `config` is shown by Weights & Biases."""
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


class Metrics:
    """Hands rows to trackers and shows them; without trackers, as on another rank than the first, it does neither."""

    def __init__(self, trackers: Sequence[Tracker], title: str):
        self._trackers, self._title = trackers, title
        self._last_line = -1e9
        self._first: tuple[float, float] | None = None  # when the first row came, and how much was over then
        self._bar: Progress | None = None
        if trackers and log.console.is_terminal and LOGGER.isEnabledFor(logging.INFO):
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} % {task.fields[status]}"),
                TimeRemainingColumn(),
                console=log.console,
            )
            self._bar.add_task(title, total=1.0, status="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        for tracker in self._trackers:
            tracker.close()

    def resume_after(self, step: int) -> None:
        """Drop the rows after a step, which the run writes again, and show the bar."""
        for tracker in self._trackers:
            tracker.resume_after(step)
        if self._bar is not None:
            self._bar.start()

    def write(self, row: dict[str, Any], done: float) -> None:
        """Write a row; it is on disk when this returns, if it can be. `done` is how much of the run is over, 0 to 1."""
        for tracker in self._trackers:
            tracker.write(row)
        if row.get("kind") == "statistics" or not self._trackers:
            return
        status = "  ".join(_shown(row))
        if self._title == NAMES["token_lm"]:
            status = status.replace("bytes/patch", "bytes/token")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, status=status)
        elif time.monotonic() - self._last_line > EVERY or "validation_bits_per_byte" in row:
            self._last_line = time.monotonic()
            LOGGER.info(f"{self._title}  {min(done, 1):4.0%}  step {row['step']}  {status}{self._left(done)}")

    def _left(self, done: float) -> str:
        """The time left at the pace since the first row."""
        if self._first is None:
            self._first = time.monotonic(), done
        began, before = self._first
        if not before < done < 1:
            return ""
        return f"  {time_left((time.monotonic() - began) * (1 - done) / (done - before))}"


def _shown(row: dict[str, Any]) -> list[str]:
    shown = {
        "bits_per_byte": "{:.3f} bits/byte",
        "validation_bits_per_byte": "held out {:.3f} bits/byte",
        "mean_patch_bytes": "{:.2f} bytes/patch",
        "bytes_per_second": "{:,.0f} bytes/s",
    }
    return [form.format(row[key]) for key, form in shown.items() if row.get(key) is not None]


class Totals(NamedTuple):
    """What a run has done so far."""

    num_bytes: int
    num_patches: int
    seconds: float
    waited: float

    @classmethod
    def of(cls, state: TrainState) -> "Totals":
        return cls(state.bytes_seen, state.patches_seen, state.seconds, state.waited)


def speed(
    then: Totals, now: Totals, model: ModelSettings, context: int, peak: float | None, ranks: Ranks
) -> dict[str, Any]:
    """Rates between two moments; None where no time has passed, or they are not known.

    Args:
        context: ids that a document's pieces hold at most.
        peak: FLOP/s of one device.
    """
    seconds = now.seconds - then.seconds
    num_bytes, num_patches = now.num_bytes - then.num_bytes, now.num_patches - then.num_patches
    found: dict[str, Any] = {
        "bytes_per_second": None,
        "patches_per_second": None,
        "model_flops_utilisation": None,
        "data_wait": None,
        "peak_memory_gib": round(max(ranks.gather(peak_memory())) / 2**30, 3),
    }
    waited = max(ranks.gather(now.waited - then.waited))
    if seconds > 0:
        found["bytes_per_second"] = round(num_bytes / seconds)
        found["patches_per_second"] = round(num_patches / seconds) if num_patches else None
        found["data_wait"] = round(min(waited / seconds, 1.0), 4)
        if peak is not None:
            patch_bytes = num_bytes / (num_patches or num_bytes)
            if model.kind == "token_lm":
                context = int(context * patch_bytes)  # in bytes
            flops = training_flops(model, patch_bytes, context) * num_bytes / seconds
            found["model_flops_utilisation"] = round(flops / (peak * ranks.world_size), 4)
    return found
