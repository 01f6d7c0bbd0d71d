"""Server-sent events, for as long as somebody listens."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bytelatent.errors import in_one_line
from bytelatent.serving.errors import ClientGone, as_api_error
from bytelatent.serving.generation import while_connected
from bytelatent.serving.request_log import record_of

LOGGER = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
SEND_SECONDS = 60.0  # in which a client must take what it is sent


class EventStream(Response):
    """Events as they come. An error within them is an event, too: the status has been sent.

    Args:
        events: JSON values. Its first one is waited for before the head is sent, so that an early error has its status.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[Any], first: Any):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.first = events, first

    @classmethod
    async def of(cls, events: AsyncIterator[Any]) -> "EventStream":
        return cls(events, await anext(events))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_data(data: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": data, "more_body": more}
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await send(message)
            except TimeoutError:  # it reads no more
                raise ClientGone from None

        record = record_of(scope)
        try:
            async with while_connected(receive), aclosing(self.events):  # pyright: ignore[reportArgumentType]
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    await send_data(_event(self.first))
                    async for event in self.events:
                        await send_data(_event(event))
                except ClientGone:
                    raise
                except Exception as error:
                    found = as_api_error(error)
                    record.reason = record.reason or found.message
                    if found.status_code == 500:
                        LOGGER.exception(f"{record.id}: {in_one_line(repr(error))}")
                    await send_data(_event(found.body()))
                await send_data(DONE, more=False)
        except ClientGone as gone:
            record.status, record.reason = gone.status_code, gone.message


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
