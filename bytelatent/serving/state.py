"""What all routes share: the model, once it is there, its names, and whether the server takes requests."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from starlette.requests import Request

from bytelatent.serving.errors import ApiError
from bytelatent.serving.limits import Limits
from bytelatent.serving.metrics import ServerMetrics

if TYPE_CHECKING:
    from bytelatent.serving.backend import Backend

Status = Literal["loading", "ready", "draining", "failed"]


class ServerState:
    """
    Args:
        names: of the model; answers and `/v1/models` have the first one where none is asked for.

    Attributes:
        is_draining: no more requests are taken.
        failure: why the model could not be loaded.
    """

    def __init__(self, names: Sequence[str], limits: Limits, version: str):
        self.names, self.limits, self.version = list(names), limits, version
        self.began = int(time.time())
        self.metrics = ServerMetrics(lambda: None if self._backend is None else self._backend.statistics())
        self.is_draining = False
        self.failure: Exception | None = None
        self._backend: Backend | None = None

    @property
    def status(self) -> Status:
        if self.failure is not None:
            return "failed"
        if self.is_draining:
            return "draining"
        return "loading" if self._backend is None else "ready"

    def ready(self, backend: "Backend") -> None:
        self._backend = backend

    @property
    def backend(self) -> "Backend":
        """
        Raises:
            ApiError: there is no model yet.
        """
        if self._backend is None:
            raise ApiError(
                503, "the model is being loaded; try again soon", code="model_loading", headers={"Retry-After": "2"}
            )
        return self._backend

    def close(self, timeout_s: float) -> bool:
        """End the engine's thread; False if what it runs has not ended in time."""
        return self._backend is None or self._backend.scheduler.close(timeout_s)

    def name_of(self, asked: str | None) -> str:
        """The model's name in an answer.

        Raises:
            ApiError: there is no model of this name.
        """
        if asked is None:
            return self.names[0]
        if asked not in self.names:
            shown = " and ".join(f"'{name}'" for name in self.names)
            message = f"there is no model '{asked[:200]}' here; this server has {shown}"
            raise ApiError(404, message, "model", "model_not_found")
        return asked


def server_state(request: Request) -> ServerState:
    return request.app.state.server
