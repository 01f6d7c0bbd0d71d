"""`/v1/completions`, as of OpenAI's API."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bytelatent.serving.answers import Completion, Plain
from bytelatent.serving.choices import ByteInfo, CompletionLogprobsWriter, byte_details
from bytelatent.serving.errors import ErrorBody
from bytelatent.serving.events import EventStream
from bytelatent.serving.generation import Plan, echoed, generation, plan_of, while_connected
from bytelatent.serving.shapes import CompletionRequest
from bytelatent.serving.state import ServerState, server_state

DEFAULT_NEW_BYTES = 200
EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}
ERRORS: Any = {code: {"model": ErrorBody} for code in (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)}

router = APIRouter(responses=ERRORS)


@router.post("/v1/completions", response_model=Completion, responses={200: {"content": EVENTS}})
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Continue a text."""
    state = server_state(request)
    prompts = [state.backend.ids_of(prompt) for prompt in body.prompts]
    most = min(DEFAULT_NEW_BYTES, state.limits.max_new_bytes) if body.max_tokens is None else body.max_tokens
    plan = await plan_of(state, body, prompts, max(most, 1), body.logprobs or 0)
    answer = CompletionAnswer(state, body, plan, request)
    async with while_connected(request.receive):
        if body.stream:
            return await EventStream.of(answer.events())
        return JSONResponse(await answer.whole())


class CompletionAnswer:
    def __init__(self, state: ServerState, body: CompletionRequest, plan: Plan, request: Request):
        self.state, self.body, self.plan, self.request = state, body, plan, request
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": plan.model,
        }
        self.usage: Plain = {}
        self.logprobs = [CompletionLogprobsWriter(body.logprobs or 0) for _ in range(plan.num_choices)]

    async def whole(self) -> Plain:
        texts: list[list[str]] = [[] for _ in self.logprobs]
        bytes_of: list[list[ByteInfo]] = [[] for _ in self.logprobs]
        reasons: list[str | None] = [None for _ in self.logprobs]
        async for index, text, infos, reason in self._pieces():
            texts[index].append(text)
            bytes_of[index] += infos
            reasons[index] = reason or reasons[index]
        choices = [
            self._choice(index, "".join(text), infos, reason)
            for index, (text, infos, reason) in enumerate(zip(texts, bytes_of, reasons, strict=True))
        ]
        return {**self.head, "choices": choices, "usage": self.usage}

    async def events(self) -> AsyncIterator[Plain]:
        asks_usage = self.body.stream_options is not None and bool(self.body.stream_options.include_usage)
        no_usage = {"usage": None} if asks_usage else {}
        async for index, text, infos, reason in self._pieces():
            choice = self._choice(index, text, infos, reason)
            details = {"bytelatent": choice.pop("bytelatent")} if self.body.bytelatent else {}
            yield {**self.head, "choices": [choice], **details, **no_usage}
        if asks_usage:
            yield {**self.head, "choices": [], "usage": self.usage}

    async def _pieces(self) -> AsyncIterator[tuple[int, str, list[ByteInfo], str | None]]:
        """What is new of each choice: the prompt first, where it is asked for."""
        body, plan = self.body, self.plan
        generates = body.max_tokens != 0
        async with generation(self.state, plan, self.request, generates) as found:
            if body.echo:
                asks = body.logprobs is not None
                read = await echoed(self.state, plan) if asks else [[] for _ in plan.prompts]
                for number, (ids, infos) in enumerate(zip(plan.prompts, read, strict=True)):
                    data = self.state.backend.bytes_of(ids)
                    for index in range(number * plan.samples, (number + 1) * plan.samples):
                        piece = found.texts[index].echo(data, infos, not generates)
                        yield index, piece.text, piece.bytes, piece.finish_reason
            if generates:
                async for index, piece in found.pieces():
                    yield index, piece.text, piece.bytes, piece.finish_reason
            self.usage = found.usage()

    def _choice(self, index: int, text: str, infos: list[ByteInfo], reason: str | None) -> Plain:
        choice: Plain = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        if self.body.logprobs is not None:
            choice["logprobs"] = self.logprobs[index].write(infos)
        if self.body.bytelatent:
            choice["bytelatent"] = byte_details(infos)
        return choice
