"""The next batch is made while the model trains on the last one."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch

from bytelatent.data.loader import Loader
from bytelatent.data.packing import Batch


class PrefetchLoader:
    """Makes a loader's batches in a thread, one ahead: the same batches, with the same state after each.

    Until it is closed torch computes with one thread on the CPU.

    Args:
        loader: must not be used by anything else.
        device: a GPU where patches are found, on a stream of its own beside the training's.
    """

    def __init__(self, loader: Loader, device: torch.device):
        self.loader = loader
        self._thread = ThreadPoolExecutor(1, "next batch")
        # Operations on batches are small: threads, as many as there are cores, would only wait for one another.
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the weights of what finds patches are there
        self._made: Future[tuple[Batch, dict[str, Any]]] | None = None
        self._state: dict[str, Any] | None = None  # after the batch that was returned last

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._made is None:
            self._made = self._thread.submit(self._make)
        made, self._made = self._made, None
        batch, self._state = made.result()
        self._made = self._thread.submit(self._make)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the thread finish its batch, and end the reading processes."""
        self._thread.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)
        self.loader.close()

    def state_dict(self) -> dict[str, Any]:
        """The state after the batch that was returned last."""
        return self.loader.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._forget()
        self.loader.load_state_dict(state)

    def redistribute(self, states: list[dict[str, Any]]) -> str:
        self._forget()
        return self.loader.redistribute(states)

    def _make(self) -> tuple[Batch, dict[str, Any]]:
        if self._stream is None:
            return next(self.loader), self.loader.state_dict()
        with torch.cuda.stream(self._stream):  # its device, too: each thread has one of its own
            return next(self.loader), self.loader.state_dict()

    def _forget(self) -> None:
        """Drop the batch that was made ahead, before the loader moves elsewhere."""
        if self._made is not None:
            self._made.exception()  # wait for it; what went wrong with it does not matter
        self._made = self._state = None
