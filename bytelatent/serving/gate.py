"""What a request must pass before a route sees it: host, key, drain, and a body within limits of size and time."""

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bytelatent.serving.errors import ApiError, ClientGone
from bytelatent.serving.limits import Limits
from bytelatent.serving.request_log import note

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
OPEN = {"/health", "/ready", "/openapi.json"}  # without a key
API = ("/v1/", "/tokenize", "/detokenize", "/metrics")
DISCARDED = 16  # times the limit of a body is read and dropped, so that a client gets its answer before it is cut off
HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::\d*)?")
ABSOLUTE = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
ABSOLUTE_RAW = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)
CLOSE = {"Connection": "close"}


class Gate:
    """
    Args:
        keys: one of them is asked for; none: anybody may.
        hosts: names in the header Host; empty: any. It keeps pages of other sites, whose names lead to this machine,
            from a server that trusts its own machine.
        is_draining: whether new requests are refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        keys: Sequence[bytes] = (),
        hosts: Sequence[str] = (),
        is_draining: Callable[[], bool] = lambda: False,
    ):
        self.app, self.limits, self.is_draining = app, limits, is_draining
        self.hosts = {host.lower() for host in hosts}
        self._keys = [hashlib.sha256(key).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        _take_origin_form(scope)
        headers, path = Headers(scope=scope), scope["path"]
        try:
            self._check_host(headers)
            if path.startswith(API):
                self._check_key(headers)
            if self.is_draining() and path not in OPEN and path != "/metrics":
                raise ApiError(503, "the server is stopping and takes no more requests", headers={"Retry-After": "5"})
            body = LimitedBody(receive, self.limits)
            if "content-length" in headers and "transfer-encoding" in headers:
                raise ApiError(400, "Content-Length and Transfer-Encoding do not go together", headers=CLOSE)
            length = headers.get("content-length", "")
            if length.isdecimal() and int(length) > self.limits.max_body_bytes:
                if "expect" not in headers:  # else the client waits for word before it sends any
                    await body.discard()
                raise body.too_large()
        except ApiError as error:
            note(scope, error)
            if scope["method"] not in ("GET", "HEAD"):  # a body that was not read is no next request
                error.headers = {**(error.headers or {}), **CLOSE}
            await error.response()(scope, receive, send)
            return
        if scope["method"] != "HEAD":
            await self.app(scope, body.receive, send)
            return
        got = {**scope, "method": "GET"}  # the server sends no body of it
        try:
            await self.app(got, body.receive, send)
        finally:
            scope["route"] = got.get("route")

    def _check_host(self, headers: Headers) -> None:
        name = _host_name(headers.get("host", ""))
        if self.hosts and name not in self.hosts:
            if not name:
                raise ApiError(403, "no host is not one of this server's; send the header Host")
            shown = name[:100]
            raise ApiError(403, f"the host '{shown}' is not one of this server's; allow it: --allow-host {shown}")

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        # All of them, each in constant time: how long it takes tells nothing about a key.
        found = sum(hmac.compare_digest(given, own) for own in self._keys)
        if kind.lower() != "bearer" or not found:
            missing = "there is no API key; send the header Authorization: Bearer KEY"
            wrong = "the API key is not one of this server's"
            raise ApiError(401, wrong if key else missing, headers={"WWW-Authenticate": "Bearer"})


def _take_origin_form(scope: Scope) -> None:
    """Let a target in absolute form, `GET http://host/health`, be its path; its host then is the request's."""
    if found := ABSOLUTE.match(scope["path"]):
        scope["path"] = found[2] or "/"
        raw = scope.get("raw_path") or b""
        scope["raw_path"] = ABSOLUTE_RAW.sub(b"", raw, count=1) or b"/"
        others = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope["headers"] = [(b"host", found[1].encode("latin-1", "replace")), *others]


def _host_name(host: str) -> str:
    """The name in a header Host, without a port and the root's dot; all of what has another form."""
    found = HOST.fullmatch(host.lower())
    return host.lower() if found is None else found[1] or found[2].removesuffix(".")


class LimitedBody:
    """Reads the body of a request within limits, with or without a stated length."""

    def __init__(self, receive: Receive, limits: Limits):
        self._receive, self._limits = receive, limits
        self._size, self._is_whole = 0, False
        self._deadline = time.monotonic() + limits.body_seconds

    async def receive(self) -> Message:
        """
        Raises:
            ApiError: the body is too large or too slow.
            ClientGone: the connection ended within it.
        """
        if self._is_whole:
            return await self._receive()
        message = await self._next()
        if message["type"] == "http.disconnect":
            raise ClientGone
        if self._size > self._limits.max_body_bytes:
            await self.discard()
            raise self.too_large()
        return message

    async def _next(self) -> Message:
        try:
            message = await asyncio.wait_for(self._receive(), max(self._deadline - time.monotonic(), 0))
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise ApiError(408, f"the body did not arrive within {seconds:g} s", headers=CLOSE) from None
        self._size += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Read and drop what is left of a body, unless that is too much."""
        while not self._is_whole and self._size <= DISCARDED * self._limits.max_body_bytes:
            if (await self._next())["type"] == "http.disconnect":
                return

    def too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._limits.max_body_bytes:,} bytes", headers=CLOSE)
