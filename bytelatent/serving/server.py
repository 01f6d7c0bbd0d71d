"""The process: a socket, uvicorn with time limits on it, the model loaded beside it, and an end in good order."""

import asyncio
import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from bytelatent.errors import STOPPED, UserError
from bytelatent.serving.errors import ApiError
from bytelatent.serving.request_log import ID_HEADER, new_id, refuse_below, request_id
from bytelatent.serving.state import ServerState
from bytelatent.signals import hearing_stops
from bytelatent.terminal import flush_output, print_line

if TYPE_CHECKING:
    from bytelatent.serving.backend import Backend

LOGGER = logging.getLogger(__name__)
KEEP_ALIVE_SECONDS = 30
MAX_HEAD = 65_536  # bytes of a request's line and headers
CLOSE_SECONDS = 2  # for what the engine's thread runs to end
LAST_ANSWERS_SECONDS = 5  # in which answers that were cut short by the end of the drain are sent


def listening_socket(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the address is not one of this machine, or in use.
    """
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
            found.listen(2048)
        except OSError:
            found.close()
            raise
    except socket.gaierror:
        raise UserError(f"host: '{host}' is no address of this machine; 127.0.0.1 or 0.0.0.0 are usual") from None
    except PermissionError:
        raise UserError(f"port: {port} is not allowed to you; take one from 1024 on: --port 8000") from None
    except OSError as error:
        taken = f"{host}:{port} cannot be had ({error.strerror}); take another: --port {port + 1 if port else 8000}"
        raise UserError(f"port: {taken}, or --port 0 for any that is free") from None
    return found


def address_of(listening: socket.socket) -> str:
    """The address to open in a browser on this machine."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


class TimedProtocol(H11Protocol):
    """uvicorn's protocol with a time limit for the head of a request, and errors in OpenAI's shape."""

    header_seconds = 10.0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._head_timer is None:
            self._wait_for_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        is_next = self.cycle is None or self.cycle.response_complete
        if is_next and self._head_timer is None and self.conn._receive_buffer:  # a part of a head that came early
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is no HTTP request", code="invalid_http"))

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(self.header_seconds, self._too_late)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
            return
        if self.conn.trailing_data[0] or self.conn._receive_buffer:
            self._refuse(ApiError(408, f"the head of the request did not arrive within {self.header_seconds:g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no whole request, and close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer was begun
            self.transport.close()
            return
        if self.cycle is not None and not self.cycle.response_complete:  # it is in its body
            scope: Any = self.cycle.scope
            refuse_below(scope, error)
            id_ = request_id(scope)
        else:
            id_ = new_id()
            LOGGER.info(f"{self.client[0] if self.client else '-'} - {error.status_code}, {id_}: {error.message}")
        response = error.response()
        headers = [*response.raw_headers, (ID_HEADER.encode(), id_.encode()), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=error.status_code, headers=headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, with a drain: it takes no new requests, and ends once the running ones have, or after some seconds."""

    def __init__(self, app: ASGIApp, state: ServerState, drain_seconds: float):
        protocol = type("Protocol", (TimedProtocol,), {"header_seconds": state.limits.header_seconds})
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEAD,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
        )
        super().__init__(config)
        self.state, self.drain_seconds = state, drain_seconds
        self._drain_ends: float | None = None
        self._quits = False

    def serve_until_stopped(self, listening: socket.socket, load: Callable[[], "Backend"]) -> None:
        """
        Args:
            load: loads the model, on a thread of its own.

        Raises:
            Exception: what `load` raised.
        """
        for name in ("uvicorn", "uvicorn.error"):
            logging.getLogger(name).setLevel(logging.ERROR)
        loading = threading.Thread(target=self._load, args=(load,), name="loading", daemon=True)
        with hearing_stops(self._hear):
            loading.start()
            self.run(sockets=[listening])
        if self._quits:
            _leave(STOPPED, "stopped: without waiting for the running requests")
        if self.state.failure is not None:
            raise self.state.failure
        ends = not loading.is_alive() and self.state.close(CLOSE_SECONDS)
        LOGGER.info("stopped")
        if not ends:
            _leave(0)

    def _load(self, load: Callable[[], "Backend"]) -> None:
        began = time.perf_counter()
        try:
            backend = load()
            gc.collect()
            gc.freeze()  # what is there now stays
            self.state.ready(backend)
            LOGGER.info(f"ready after {time.perf_counter() - began:.1f} s")
        except BaseException as error:
            self.state.failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
            self.should_exit = True

    def capture_signals(self) -> Any:
        return hearing_stops(self._hear)

    def _hear(self) -> None:
        """A first signal begins the drain; a second one ends it."""
        if self.state.is_draining:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of each request that is cancelled
            self._quits = self.should_exit = self.force_exit = True
            return
        self.state.is_draining = True
        self._drain_ends = time.monotonic() + self.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if self._drain_ends is not None and not self.should_exit:
            num_open = len(self.server_state.tasks)
            if counter % 100 == 0 and num_open:
                LOGGER.info(f"draining: {_requests(num_open)} still being answered")
            late = time.monotonic() >= self._drain_ends
            if late and num_open:
                LOGGER.warning(f"drain: {_requests(num_open)} cut short after {self.drain_seconds:g} s")
                await asyncio.to_thread(self.state.close, CLOSE_SECONDS)
            self.should_exit = late or not num_open
        return await super().on_tick(counter)


def _requests(number: int) -> str:
    return "1 request is" if number == 1 else f"{number:,} requests are"


def _leave(code: int, line: str = "") -> NoReturn:
    """End the process while a thread computes, which the end of the interpreter would break off in its midst."""
    if line:
        with suppress(OSError):  # nobody may read it any more
            print_line(line, sys.stderr)
    logging.shutdown()
    flush_output()
    os._exit(code)
