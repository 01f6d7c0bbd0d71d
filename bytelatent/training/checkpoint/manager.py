"""CheckpointManager: all that the next step depends on.

A checkpoint is a folder that appears whole or not at all, written by all ranks together. It holds:

| file                           | holds                                                                        |
| ------------------------------ | ---------------------------------------------------------------------------- |
| `state/`                       | weights and the optimizer's state, in the parts that the ranks hold          |
| `ranks/00000.pt` ...           | of each rank with batches of its own: the loader's position, random state    |
| `progress.pt`                  | counts                                                                       |
| `config.json`, `*.safetensors` | the model in our format: always of one process, of several at the run's end  |
"""

import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from bytelatent.data import Batch, Loader, ReadAhead
from bytelatent.data.source import OtherFiles
from bytelatent.errors import UserError
from bytelatent.files import Digest, DiskFull, digest_of, explain, manifest_of, what_is_torn, whole_folder
from bytelatent.run_folder import checkpoint_name, checkpoints_in, newest_whole, none_whole
from bytelatent.training.checkpoint.settings import CheckpointSettings
from bytelatent.training.checkpoint.staging import Copies
from bytelatent.training.distributed.plan import ParallelPlan, free_gathered_weights
from bytelatent.training.optimizer import Optimizers
from bytelatent.training.schedule import Schedule
from bytelatent.weights import Config, StoredModel
from bytelatent.weights.native import write_native
from bytelatent.weights.safetensors_io import StoredTensor

PAUSES = (15, 60, 240)  # seconds after which a save is tried again where the disk is full
LINGER = 60  # seconds that a run which failed gives the save under way


@dataclass
class TrainState:
    """What changes from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | Optimizers
    loader: Loader | ReadAhead
    step: int = 0  # steps done
    bytes_seen: int = 0  # bytes of text predicted
    seconds: float = 0.0  # spent in steps
    recent: list[float] = field(default_factory=list)  # losses of the last steps, nats a target
    schedule: Schedule = field(default_factory=Schedule)
    patches_seen: int = 0  # this and the next: since the process started
    waited: float = 0.0  # seconds of this rank's steps in which it waited for data
    skipped: int = 0  # updates left out in a row
    peeked: list[Batch] = field(default_factory=list)  # read already, and to come next


@dataclass
class Content:
    """What a checkpoint is to hold, of this rank."""

    folder: Path
    tensors: dict[str, Tensor]
    progress: dict[str, Any]
    own: dict[str, Any] | None  # None: another rank of the tensor group writes the same
    model: dict[str, Tensor] | None  # whole, on the first rank, where it is wanted in our format


def must_take_checkpoints(run: Path) -> None:
    """Complain where a run's folder has a place for checkpoints that takes none, before there is work to lose."""
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
    """The checkpoints of a run. All ranks call the methods, in the same order.

    Args:
        asynchronous: write in a thread, from a copy.
        say: is told what people should know.
        stopped: whether the run is to stop, as `StopSignals` says it: then a full disk is not waited for.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        settings: CheckpointSettings,
        plan: ParallelPlan,
        asynchronous: bool,
        say: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ):
        self.parent = run / "checkpoints"
        self.config, self.settings, self.plan, self.say = config, settings, plan, say
        self.asynchronous, self.stopped = asynchronous, stopped
        self.ranks = plan.ranks.with_own_group()
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copies = Copies()  # what the writer reads
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None and (kind is None or issubclass(kind, Exception)):
            self._writer.join(LINGER)
        self._copies.close()

    def prepare(self, state: TrainState) -> None:
        """Get ready in the background, as soon as a step has been made; a save that comes before waits for it."""
        from bytelatent.training.checkpoint.storage import tensors_of  # it takes seconds to import

        if self.asynchronous:
            self._copies.prepare(tensors_of(state.model, state.optimizer))

    @property
    def are_prepared(self) -> bool:
        return self._copies.are_prepared

    def save(self, state: TrainState, over: bool = False, needed: bool = False) -> None:
        """Save, in the background if so set; a full disk is waited for, and then done without.

        Args:
            over: this is the last one, which also holds the model in our format.
            needed: return only when it is written, and raise an error where it cannot be.
        """
        self.wait()
        content = self._content(state, over)
        if self.asynchronous:
            self._writer = threading.Thread(target=self._write_aside, args=(content, needed), daemon=True)
            self._writer.start()
            if needed:
                self.wait()
        else:
            self._write(content, needed)

    @property
    def is_writing(self) -> bool:
        """Whether a save is under way in the background."""
        return self._writer is not None and self._writer.is_alive()

    def check(self) -> None:
        """Raise the error that the writer met, if it did."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for the save under way, and raise the error that it met."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.check()

    def load(self, state: TrainState, position: bool = True) -> bool:
        """Bring `state` to the newest whole checkpoint; False if there is none.

        Args:
            position: of the loader, too; otherwise the text that was read since is passed over.
        """
        self.wait()
        folder, passed_over = newest_whole(self.parent, self._torn)
        if folder is None:
            if passed_over:
                raise self.ranks.common_error(none_whole(self.parent.parent, passed_over))
            return False
        for line in passed_over:
            self.say(line)
        try:
            self._load(folder, state, position)
        except (RuntimeError, KeyError, ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise self.ranks.common_error(error) from None
            text = " ".join(str(error).split())
            raise self.ranks.common_error(UserError(f"'{folder}' is no checkpoint of this run: {text}")) from None
        return True

    def _torn(self, folder: Path) -> str | None:
        """As `what_is_torn`; each rank looks at some of the files."""
        found = self.plan.ranks.gather(what_is_torn(folder, "", self.plan.ranks.rank, self.plan.ranks.world_size))
        return next((torn for torn in found if torn is not None), None)

    def _load(self, folder: Path, state: TrainState, position: bool) -> None:
        from bytelatent.training.checkpoint.storage import read_tensors  # it takes seconds to import

        read_tensors(folder / "state", state.model, state.optimizer, self.plan.ranks)
        progress = torch.load(folder / "progress.pt", weights_only=True)
        if position:
            places = [folder / name for name in manifest_of(folder)]
            files = sorted(place for place in places if place.parent.name == "ranks")
            self._load_position(files, state)
            state.bytes_seen, state.seconds = progress["bytes_seen"], progress["seconds"]
        state.step, state.recent = progress["step"], progress["recent"]
        if "schedule" not in progress:
            raise UserError(
                f"'{folder}' was written by an earlier version, which stored nothing of the learning rate's schedule; "
                "go on with that version, or use another run=FOLDER"
            )
        state.schedule.load_state_dict(progress["schedule"])

    def _load_position(self, files: list[Path], state: TrainState) -> None:
        """Go on in the text where each rank stood; dealt out where there are other ranks, or other files of text."""
        if len(files) == self.plan.data_world_size:
            own = torch.load(files[self.plan.data_rank], weights_only=True)
            with suppress(OtherFiles):
                state.loader.load_state_dict(_as_arrays(own["loader"]))
                torch.set_rng_state(own["torch_random"])
                return
        all_ranks = [torch.load(file, weights_only=True) for file in files]
        self.say(state.loader.deal([_as_arrays(own["loader"]) for own in all_ranks]))

    def _content(self, state: TrainState, over: bool) -> Content:
        from bytelatent.training.checkpoint.storage import tensors_of  # it takes seconds to import

        free_gathered_weights(state.model)
        tensors = tensors_of(state.model, state.optimizer)
        if self.asynchronous:
            tensors = self._copies.take(tensors)
        progress = {
            "step": state.step,
            "bytes_seen": state.bytes_seen,
            "seconds": state.seconds,
            "recent": list(state.recent),
            "schedule": state.schedule.state_dict(),
        }
        own = {"loader": _as_tensors(state.loader.state_dict()), "torch_random": torch.get_rng_state()}
        model = None
        if self.ranks.world_size == 1:
            model = {name: tensors[f"model.{name}"] for name, _ in state.model.named_parameters()}
        elif over:
            whole = ((name, self.plan.whole(part)) for name, part in state.model.named_parameters())
            model = {name: value for name, value in whole if value is not None}
        reads = self.plan.ranks.rank % self.plan.settings.tensor == 0
        return Content(
            self.parent / checkpoint_name(state.step),
            tensors,
            progress,
            own if reads else None,
            model or None,
        )

    def _write_aside(self, content: Content, needed: bool) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # a thread begins on the first one
        try:
            self._write(content, needed)
        except BaseException as error:
            self._error = error

    def _write(self, content: Content, needed: bool) -> None:
        for pause in (*PAUSES, None):
            try:
                self._write_once(content)
                return
            except DiskFull as error:
                if pause is not None and not self._is_to_stop():
                    self.say(f"{error} (the next try is in {pause} s)")
                    if self._paused(pause):
                        continue
                if needed:
                    raise self.ranks.common_error(error) from None
                self.say(f"{error} (training goes on without it)")
                return
            except UserError as error:
                raise self.ranks.common_error(error) from None

    def _paused(self, seconds: int) -> bool:
        """Wait; False where a wish to stop cut it short. Each second all ranks ask one another."""
        for _ in range(seconds):
            if self._is_to_stop():
                return False
            time.sleep(1)
        return True

    def _is_to_stop(self) -> bool:
        return any(self.ranks.gather(self.stopped()))

    def _write_once(self, content: Content) -> None:
        error = None
        try:
            self._write_together(content)
        except Exception as met:
            error = met
        # The others go on only when the folder stands where it belongs.
        self._agreed(content.folder, error, None)
        if self.ranks.is_first:
            self._remove_old(content.progress["step"])

    def _write_together(self, content: Content) -> None:
        from bytelatent.training.checkpoint import storage

        known: dict[str, Digest] = {}
        with ExitStack() as stack:
            aside, error = None, None
            try:
                if self.ranks.is_first:
                    aside = stack.enter_context(whole_folder(content.folder, known))
                    (aside / "ranks").mkdir()
                    storage.begin_folder(aside / "state", self.config)
            except Exception as met:
                error = met
            aside = self._agreed(content.folder, error, aside)[0]
            error, own = None, {}
            try:
                own = self._write_own(aside, content)
            except Exception as met:
                error = met
            for some in self._agreed(content.folder, error, own):
                known.update(some)

    def _write_own(self, aside: Path, content: Content) -> dict[str, Digest]:
        """Write this rank's files; their digests."""
        from bytelatent.training.checkpoint.storage import write_tensors

        write_tensors(aside / "state", content.tensors, self.ranks)
        if content.own is not None:
            torch.save(content.own, aside / "ranks" / f"{self.plan.data_rank:05d}.pt")
        if self.ranks.is_first:
            torch.save(content.progress, aside / "progress.pt")
        if content.model is not None:
            tensors = {name: StoredTensor.of(value) for name, value in content.model.items()}
            write_native(aside, StoredModel(self.config, tensors, None, "in memory", "memory"))
        self.stopped()  # an order to quit that torch.save has swallowed is met here, before the folder counts as whole
        if self.ranks.world_size == 1:
            return {}
        mine = (aside / "state").glob(f"__{self.ranks.rank}_*")
        return {f"state/{file.name}": digest_of(file) for file in mine}

    def _agreed(self, folder: Path, error: Exception | None, value: Any) -> list[Any]:
        """What each rank gives, or on all of them the error that one met."""
        if error is not None and self.ranks.world_size > 1:
            try:
                explain(folder, error)
            except UserError as explained:
                error = explained
        met = None if error is None else (isinstance(error, DiskFull), f"{type(error).__name__}: {error}")
        answers = self.ranks.gather((met, value))
        if error is not None:
            raise error
        for rank, (met, _) in enumerate(answers):
            if met is not None:
                is_full, text = met
                text = text.partition(": ")[2] if is_full else f"'{folder}' was not written by rank {rank}: {text}"
                raise DiskFull(text) if is_full else UserError(text)
        return [value for _, value in answers]

    def _remove_old(self, newest: int) -> None:
        """Keep only the checkpoints that are to stay, of those up to the step `newest`."""
        keep, keep_every = self.settings.keep, self.settings.keep_every
        # Later ones are torn: this step could not have been done again otherwise. They must not push out whole ones.
        done = [(step, folder) for step, folder in checkpoints_in(self.parent).items() if step <= newest]
        for step, old in done[:-keep]:
            if keep_every is None or step % keep_every:
                shutil.rmtree(old, ignore_errors=True)
        for ending in ("part", "old"):  # left by a process that was killed
            for unfinished in self.parent.glob(f".step-*.[0-9]*.{ending}"):
                shutil.rmtree(unfinished, ignore_errors=True)


def _as_tensors(value: Any) -> Any:
    """Arrays as tensors, so that the file loads with `weights_only=True`."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: _as_tensors(inner) for key, inner in value.items()}
    return [_as_tensors(inner) for inner in value] if isinstance(value, list) else value


def _as_arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: _as_arrays(inner) for key, inner in value.items()}
    return [_as_arrays(inner) for inner in value] if isinstance(value, list) else value
