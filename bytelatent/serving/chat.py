"""`/v1/chat/completions`, as of OpenAI's API."""

import secrets
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bytelatent.serving.answers import ChatCompletion, Plain
from bytelatent.serving.choices import ByteInfo, byte_details, chat_logprobs
from bytelatent.serving.completions import ERRORS, EVENTS
from bytelatent.serving.events import EventStream
from bytelatent.serving.generation import Plan, generation, plan_of, while_connected
from bytelatent.serving.shapes import ChatRequest
from bytelatent.serving.state import ServerState, server_state

router = APIRouter(responses=ERRORS)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={200: {"content": EVENTS}})
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer the last message of a chat."""
    state = server_state(request)
    ids, stops = state.backend.chat_prompt(
        [message.model_dump(include={"role", "content"}) for message in body.messages]
    )
    most = state.limits.max_new_bytes if body.max_new_bytes is None else body.max_new_bytes
    plan = await plan_of(state, body, [ids], most, body.top_logprobs or 0, stops)
    answer = ChatAnswer(state, body, plan, request)
    async with while_connected(request.receive):
        if body.stream:
            return await EventStream.of(answer.events())
        return JSONResponse(await answer.whole())


class ChatAnswer:
    def __init__(self, state: ServerState, body: ChatRequest, plan: Plan, request: Request):
        self.state, self.body, self.plan, self.request = state, body, plan, request
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": plan.model,
        }

    async def whole(self) -> Plain:
        texts: list[list[str]] = [[] for _ in range(self.plan.samples)]
        bytes_of: list[list[ByteInfo]] = [[] for _ in texts]
        reasons: list[str | None] = [None for _ in texts]
        async with generation(self.state, self.plan, self.request) as found:
            async for index, piece in found.pieces():
                texts[index].append(piece.text)
                bytes_of[index] += piece.bytes
                reasons[index] = piece.finish_reason or reasons[index]
        choices = []
        for index, (text, infos, reason) in enumerate(zip(texts, bytes_of, reasons, strict=True)):
            message = {"role": "assistant", "content": "".join(text), "refusal": None}
            choices.append({"index": index, "message": message, **self._about(infos, reason)})
            if self.body.bytelatent:
                choices[-1]["bytelatent"] = byte_details(infos)
        return {**self.head, "choices": choices, "usage": found.usage()}

    async def events(self) -> AsyncIterator[Plain]:
        head = {**self.head, "object": "chat.completion.chunk"}
        asks_usage = self.body.stream_options is not None and bool(self.body.stream_options.include_usage)
        no_usage = {"usage": None} if asks_usage else {}
        async with generation(self.state, self.plan, self.request) as found:
            for index in range(self.plan.samples):
                choice = {"index": index, "delta": {"role": "assistant", "content": ""}, **self._about([], None)}
                yield {**head, "choices": [choice], **no_usage}
            async for index, piece in found.pieces():
                delta = {"content": piece.text} if piece.text else {}
                choice = {"index": index, "delta": delta, **self._about(piece.bytes, piece.finish_reason)}
                details = {"bytelatent": byte_details(piece.bytes)} if self.body.bytelatent else {}
                yield {**head, "choices": [choice], **details, **no_usage}
        if asks_usage:
            yield {**head, "choices": [], "usage": found.usage()}

    def _about(self, infos: list[ByteInfo], reason: str | None) -> Plain:
        logprobs = chat_logprobs(infos, self.body.top_logprobs or 0) if self.body.logprobs else None
        return {"logprobs": logprobs, "finish_reason": reason}
