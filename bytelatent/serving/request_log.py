"""One line in the log per request, with why it was refused; no error leaves the server but in OpenAI's shape."""

import asyncio
import logging
import re
import secrets
import time
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bytelatent.errors import in_one_line
from bytelatent.serving.errors import GONE, ApiError, as_api_error
from bytelatent.serving.metrics import ServerMetrics

LOGGER = logging.getLogger(__name__)
ID_HEADER = "x-request-id"
SOUND_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # any other one could forge words of the log
QUIET = {"/health", "/ready", "/metrics"}  # what monitoring asks for every few seconds is logged at debug level


@dataclass
class RequestRecord:
    """What is known of a request for its line in the log.

    Attributes:
        reason: why it was refused, or how it ended early.
        prompt_bytes, new_bytes: read and generated.
    """

    id: str
    began_s: float = field(default_factory=time.perf_counter)
    status: int | None = None
    reason: str = ""
    prompt_bytes: int = 0
    new_bytes: int = 0
    first_byte_s: float | None = None

    def first_byte(self) -> None:
        if self.first_byte_s is None:
            self.first_byte_s = time.perf_counter() - self.began_s


def record_of(scope: Scope) -> RequestRecord:
    return scope["state"]["record"]


def new_id() -> str:
    return f"req-{secrets.token_hex(12)}"


def request_id(scope: Scope) -> str:
    """The id of a request, its own if it has a sound one."""
    state = scope.setdefault("state", {})
    if "id" not in state:
        given = Headers(scope=scope).get(ID_HEADER, "")
        state["id"] = given if SOUND_ID.fullmatch(given) else new_id()
    return state["id"]


def refuse_below(scope: Scope, error: ApiError) -> None:
    """Note that the protocol has refused the rest of a request whose body is being read."""
    scope["state"]["refusal"] = error


class RequestLog:
    """The outermost layer: request ids, the log, metrics, and errors that nothing else has caught."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(request_id(scope))
        scope["state"]["record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[ID_HEADER] = record.id
            await send(message)

        self.metrics.open_requests.inc()
        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            found = as_api_error(error)
            record.reason = record.reason or found.message
            if found.status_code == 500:
                LOGGER.exception(f"{record.id}: {in_one_line(repr(error))}")
            if record.status is None:
                await found.response()(scope, receive, send_with_id)
            if found.status_code == GONE:
                record.status = GONE
        except asyncio.CancelledError:
            record.reason = record.reason or "the server stopped"
            raise
        finally:
            self.metrics.open_requests.dec()
            if (refusal := scope["state"].get("refusal")) is not None:
                record.status, record.reason = refusal.status_code, refusal.message
            self._log(scope, record)

    def _log(self, scope: Scope, record: RequestRecord) -> None:
        seconds = time.perf_counter() - record.began_s
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self.metrics.requests.labels(path, str(record.status)).inc()
        self.metrics.request_seconds.labels(path).observe(seconds)
        client = scope.get("client")
        parts = [
            f"{client[0] if client else '-'} {scope['method']} {in_one_line(scope['path'])[:200]} {record.status}",
            f"{seconds:.3f} s",
        ]
        if record.prompt_bytes or record.new_bytes:
            parts.append(f"{record.prompt_bytes:,} + {record.new_bytes:,} bytes")
        if record.first_byte_s is not None:
            parts.append(f"first byte {record.first_byte_s:.3f} s")
        parts.append(record.id)
        line = ", ".join(parts) + (f": {record.reason}" if record.reason else "")
        is_quiet = scope["path"] in QUIET and record.status == 200
        LOGGER.log(logging.DEBUG if is_quiet else logging.INFO, line)


def note(scope: Scope, error: ApiError) -> None:
    """Remember why a request is refused."""
    record = record_of(scope)
    record.reason = record.reason or error.message
