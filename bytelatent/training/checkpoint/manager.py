"""Saving and resuming: all that the next step depends on.

A checkpoint is a folder that appears whole or not at all, written by all ranks together. It holds:

| file                           | holds                                                                              |
| ------------------------------ | ---------------------------------------------------------------------------------- |
| `state/`                       | weights and the optimizer's state, each rank's part in files of its own            |
| `ranks/00000.pt` ...           | for each rank that reads batches: the loader's position, random state              |
| `progress.pt`                  | counts                                                                             |
| `config.json`, `*.safetensors` | the model in our format: of one process always, of several in the last checkpoint  |

With `checkpoint.last: weights` the last one holds only the model and the counts.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bytelatent.data import Batch, Loader, PrefetchLoader
from bytelatent.data.source import FilesChanged
from bytelatent.errors import UserError
from bytelatent.files import Digest, DiskFull, digest_of, explain, find_corruption, manifest_of, whole_folder
from bytelatent.run_folder import NoCheckpoint, checkpoint_name, checkpoints_of, newest_checkpoint
from bytelatent.training.checkpoint.settings import CheckpointSettings
from bytelatent.training.checkpoint.storage import CpuCopies, begin_folder, read_tensors, tensors_of, write_tensors
from bytelatent.training.distributed.parallelize import (
    ParallelPlan,
    copy_local_part,
    free_gathered_weights,
    whole_on_first,
)
from bytelatent.training.optimizer import Optimizers, catch_up
from bytelatent.training.schedule import Schedule
from bytelatent.weights import NATIVE, Config, StoredModel, StoredTensor, load

LOGGER = logging.getLogger(__name__)
Value = TypeVar("Value")

PAUSES = (15, 60, 240)  # seconds after which a save is tried again while the disk is full
LINGER = 60  # seconds that a failed run waits for the save in progress


@dataclass
class TrainState:
    """What changes from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | Optimizers
    loader: Loader | PrefetchLoader
    step: int = 0  # steps done
    bytes_seen: int = 0  # bytes of text predicted
    seconds: float = 0.0  # spent in steps
    recent: list[float] = field(default_factory=list)  # losses of the last steps, nats per target
    schedule: Schedule = field(default_factory=Schedule)
    patches_seen: int = 0  # since the process started
    all_patches: int | None = 0  # of `bytes_seen`; None: a checkpoint of an earlier version did not count them
    waited: float = 0.0  # seconds in which this rank waited for data, since the process started
    skipped: int = 0  # updates skipped in a row
    peeked: list[Batch] = field(default_factory=list)  # batches that were read and come next


@dataclass
class CheckpointContent:
    """What this rank writes into a checkpoint."""

    folder: Path
    tensors: dict[str, Tensor]
    progress: dict[str, Any]
    position: dict[str, Any] | None  # of the loader; None: another rank of the tensor group writes the same
    model: dict[str, Tensor] | None  # whole weights, on the first rank, if the checkpoint holds them in our format


def check_takes_checkpoints(run: Path) -> None:
    """Check that checkpoints can be written into a run's folder, before there is work to lose.

    Raises:
        UserError: it has a `checkpoints` that is no writable folder.
    """
    parent = run / "checkpoints"
    try:
        if os.path.lexists(parent):
            TemporaryDirectory(prefix=".", dir=parent).cleanup()
    except OSError as error:
        raise UserError(
            f"'{os.path.realpath(parent)}' cannot take checkpoints: {error.strerror or error}; make it a folder that "
            f"can be written to, or remove '{parent}', or use another run=FOLDER"
        ) from None


class CheckpointManager:
    """Writes and reads the checkpoints of a run. All ranks call the methods, in the same order.

    Args:
        asynchronous: write in a thread, from a copy of the state.
        should_stop: whether the run was asked to stop: then it does not wait for a full disk.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        settings: CheckpointSettings,
        plan: ParallelPlan,
        asynchronous: bool,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.run, self.config, self.settings, self.plan = run, config, settings, plan
        self.asynchronous, self.should_stop = asynchronous, should_stop
        self.ranks = plan.ranks.with_own_group()
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self.holds_weights_only = False  # the checkpoint that the run resumed from
        self._copies = CpuCopies()  # what the writer reads
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None and (kind is None or issubclass(kind, Exception)):
            self._writer.join(LINGER)
        self._copies.close()

    def prepare(self, state: TrainState) -> None:
        """Allocate memory for copies in the background, after the first step; an earlier save waits for it."""
        if self.asynchronous:
            self._copies.prepare(tensors_of(state.model, state.optimizer))

    @property
    def are_prepared(self) -> bool:
        return self._copies.are_prepared

    @property
    def is_writing(self) -> bool:
        """Whether a save is in progress in the background."""
        return self._writer is not None and self._writer.is_alive()

    def check(self) -> None:
        """Raise the error of the background save, if it had one."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for the save in progress, and raise its error."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.check()

    # Saving

    def save(self, state: TrainState, is_last: bool = False, is_needed: bool = False) -> None:
        """Write a checkpoint, in the background if asynchronous. While the disk is full it tries again, then skips it.

        Args:
            is_last: of the run; it also holds the model in our format.
            is_needed: return only after it is written, and raise an error if it cannot be.
        """
        self.wait()
        content = self._content(state, is_last)
        if self.asynchronous:
            self._writer = threading.Thread(target=self._write_in_thread, args=(content, is_needed), daemon=True)
            self._writer.start()
            if is_needed:
                self.wait()
        else:
            self._write(content, is_needed)

    def _content(self, state: TrainState, is_last: bool) -> CheckpointContent:
        free_gathered_weights(state.model)
        catch_up(state.optimizer)
        only_weights = is_last and self.settings.last == "weights"
        tensors = {} if only_weights else tensors_of(state.model, state.optimizer)
        if self.asynchronous and tensors:
            tensors = self._copies.take(tensors)
        progress = {
            "step": state.step,
            "bytes_seen": state.bytes_seen,
            "all_patches": state.all_patches,
            "seconds": state.seconds,
            "recent": list(state.recent),
            "schedule": state.schedule.state_dict(),
        }
        position = {"loader": arrays_to_tensors(state.loader.state_dict()), "torch_random": torch.get_rng_state()}
        model = None
        if self.ranks.world_size == 1 and not only_weights:
            model = {name: tensors[f"model.{name}"] for name, _ in state.model.named_parameters()}
        elif is_last:
            own = ((name, weight.detach()) for name, weight in state.model.named_parameters())
            found = ((name, whole_on_first(weight, self.ranks.is_first)) for name, weight in own)
            model = {name: whole for name, whole in found if whole is not None}
        reads = self.plan.ranks.rank % self.plan.settings.tensor == 0 and not only_weights
        folder = self.run / "checkpoints" / checkpoint_name(state.step)
        return CheckpointContent(folder, tensors, progress, position if reads else None, model or None)

    def _write_in_thread(self, content: CheckpointContent, is_needed: bool) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # a new thread is on the first one
        try:
            self._write(content, is_needed)
        except BaseException as error:
            self._error = error

    def _write(self, content: CheckpointContent, is_needed: bool) -> None:
        for pause in (*PAUSES, None):
            try:
                self._write_once(content)
                return
            except DiskFull as error:
                if pause is not None and not self._any_should_stop():
                    self._warn(f"{error} (the next try is in {pause} s)")
                    if self._pause(pause):
                        continue
                if is_needed:
                    raise self.ranks.common_error(error) from None
                self._warn(f"{error} (training continues without it)")
                return
            except UserError as error:
                raise self.ranks.common_error(error) from None

    def _pause(self, seconds: int) -> bool:
        """Wait; False if the run was asked to stop meanwhile, which all ranks agree on each second."""
        for _ in range(seconds):
            if self._any_should_stop():
                return False
            time.sleep(1)
        return True

    def _any_should_stop(self) -> bool:
        return any(self.ranks.gather(self.should_stop()))

    def _warn(self, line: str) -> None:
        if self.ranks.is_first:
            LOGGER.warning(line)

    def _write_once(self, content: CheckpointContent) -> None:
        # Ranks continue only when the folder has its final name.
        self._together(content.folder, lambda: self._write_folder(content))
        if self.ranks.is_first:
            self._remove_old(content.progress["step"])

    def _write_folder(self, content: CheckpointContent) -> None:
        known: dict[str, Digest] = {}

        def begin() -> Path | None:
            if not self.ranks.is_first:
                return None
            part = stack.enter_context(whole_folder(content.folder, known))
            (part / "ranks").mkdir()
            begin_folder(part / "state", self.config)
            return part

        with ExitStack() as stack:
            part = self._together(content.folder, begin)[0]
            assert part is not None
            for written in self._together(content.folder, lambda: self._write_own(part, content)):
                known.update(written)

    def _write_own(self, folder: Path, content: CheckpointContent) -> dict[str, Digest]:
        """Write this rank's files; return their digests."""
        if content.tensors:
            write_tensors(folder / "state", content.tensors, self.ranks)
        if content.position is not None:
            torch.save(content.position, folder / "ranks" / f"{self.plan.data_rank:05d}.pt")
        if self.ranks.is_first:
            torch.save(content.progress, folder / "progress.pt")
        if content.model is not None:
            tensors = {name: StoredTensor.of(value) for name, value in content.model.items()}
            NATIVE.write(folder, StoredModel(self.config, tensors, None, "in memory", "memory"))
        self.should_stop()  # raises the KeyboardInterrupt that torch.save may have swallowed
        if self.ranks.world_size == 1:
            return {}
        mine = (folder / "state").glob(f"__{self.ranks.rank}_*")
        return {f"state/{file.name}": digest_of(file) for file in mine}

    def _together(self, folder: Path, call: Callable[[], Value]) -> list[Value]:
        """Call it on every rank, and return every rank's result; an error of one rank is raised on all of them."""
        result: Any = None
        error = None
        try:
            result = call()
        except Exception as raised:
            error = raised
        if error is not None and self.ranks.world_size > 1:
            try:
                explain(folder, error)
            except UserError as explained:
                error = explained
        described = None if error is None else f"{type(error).__name__}: {error}"
        answers = self.ranks.gather((described, str(error) if isinstance(error, DiskFull) else None, result))
        if error is not None:
            raise error
        for rank, (failure, full_disk, _) in enumerate(answers):
            if full_disk is not None:
                raise DiskFull(full_disk)
            if failure is not None:
                raise UserError(f"'{folder}' was not written by rank {rank}: {failure}")
        return [value for _, _, value in answers]

    def _remove_old(self, newest: int) -> None:
        """Remove checkpoints up to the step `newest`, but for those that the settings keep."""
        keep, keep_every = self.settings.keep, self.settings.keep_every
        # Later ones are corrupt, as this step was done again. They do not count among those to keep.
        done = [(step, folder) for step, folder in checkpoints_of(self.run).items() if step <= newest]
        for step, folder in done[:-keep]:
            if keep_every is None or step % keep_every:
                shutil.rmtree(folder, ignore_errors=True)
        for suffix in ("part", "old"):  # left by a killed process
            for unfinished in (self.run / "checkpoints").glob(f".step-*.[0-9]*.{suffix}"):
                shutil.rmtree(unfinished, ignore_errors=True)

    # Resuming

    def resume(self, state: TrainState, position: bool = True) -> bool:
        """Bring `state` to the newest checkpoint that is not corrupt; False if there is no checkpoint.

        Args:
            position: also of the loader; otherwise the text read since is skipped.

        Raises:
            UserError: all checkpoints are corrupt, or the newest one belongs to another model.
        """
        self.wait()
        try:
            folder, corrupt = newest_checkpoint(self.run, self._why_corrupt)
        except NoCheckpoint as error:
            if error.corrupt:
                raise self.ranks.common_error(error) from None
            return False
        for line in corrupt:
            self._warn(line)
        try:
            self._load(folder, state, position)
        except UserError as error:
            raise self.ranks.common_error(error) from None
        except (RuntimeError, KeyError, ValueError, OSError) as error:
            raise self.ranks.common_error(UserError(f"'{folder}' is no checkpoint of this run: {error}")) from None
        return True

    def _why_corrupt(self, folder: Path) -> str | None:
        """As `find_corruption`; each rank checks some of the files."""
        found = self.ranks.gather(find_corruption(folder, "", self.ranks.rank, self.ranks.world_size))
        return next((why for why in found if why is not None), None)

    def _load(self, folder: Path, state: TrainState, position: bool) -> None:
        progress = torch.load(folder / "progress.pt", weights_only=True)
        files = sorted(folder / name for name in manifest_of(folder) if Path(name).parent.name == "ranks")
        self.holds_weights_only = not files
        if files:
            read_tensors(folder / "state", state.model, state.optimizer, self.plan.ranks)
        else:
            weights = load(folder).model.state_dict()
            for name, place in state.model.named_parameters():
                copy_local_part(place.detach(), weights[name])
        if position:
            if files:
                self._load_position(files, state)
            state.bytes_seen, state.seconds = progress["bytes_seen"], progress["seconds"]
            state.all_patches = progress.get("all_patches")
        state.step, state.recent = progress["step"], progress["recent"]
        if "schedule" not in progress:
            raise UserError(
                f"'{folder}' was written by an earlier version, which stored nothing of the learning rate's schedule; "
                "resume it with that version, or use another run=FOLDER"
            )
        state.schedule.load_state_dict(progress["schedule"])

    def _load_position(self, files: list[Path], state: TrainState) -> None:
        """Continue in the text where each rank was, or, if ranks or files differ, divide what is left among ranks."""
        if len(files) == self.plan.data_world_size:
            own = torch.load(files[self.plan.data_rank], weights_only=True)
            with suppress(FilesChanged):
                state.loader.load_state_dict(tensors_to_arrays(own["loader"]))
                torch.set_rng_state(own["torch_random"])
                return
        all_ranks = [torch.load(file, weights_only=True) for file in files]
        LOGGER.info(state.loader.redistribute([tensors_to_arrays(own["loader"]) for own in all_ranks]))


def arrays_to_tensors(value: Any) -> Any:
    """Arrays in dicts and lists as tensors, so that the file loads with `weights_only=True`."""
    return tree_map_only(np.ndarray, lambda array: torch.from_numpy(array.copy()), value)


def tensors_to_arrays(value: Any) -> Any:
    """The inverse of `arrays_to_tensors`."""
    return tree_map_only(Tensor, Tensor.numpy, value)
