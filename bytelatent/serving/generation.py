"""The jobs of one request: submitted together, cancelled as soon as nobody waits for them."""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.types import Receive

from bytelatent.errors import UserError
from bytelatent.inference.settings import Sampling
from bytelatent.serving.answers import Plain
from bytelatent.serving.choices import ByteInfo, ChoiceText, TextPiece
from bytelatent.serving.errors import ApiError, ClientGone
from bytelatent.serving.request_log import RequestRecord, record_of
from bytelatent.serving.shapes import GenerationBody
from bytelatent.serving.state import ServerState

if TYPE_CHECKING:
    from torch import Tensor

    from bytelatent.inference.constraint import Constraint
    from bytelatent.serving.scheduler import Ticket, Update

DEFAULT_TEMPERATURE = 1.0  # as of OpenAI's API
DEFAULT_ALTERNATIVES = 5  # of `bytelatent: true`
INTERVAL_S = 0.02  # between two chunks of a stream at least, the first ones excepted: a chunk costs more than a byte


@dataclass
class Plan:
    """What a request asks for, checked.

    Attributes:
        prompts: ids, BOS first.
        num_alternatives: shown for each byte.
    """

    model: str
    prompts: list["Tensor"]
    sampling: Sampling
    max_new_bytes: int
    samples: int
    num_alternatives: int = 0
    constraint: "Constraint | None" = None

    @property
    def prompt_bytes(self) -> int:
        return sum(len(ids) - 1 for ids in self.prompts)

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.samples


async def plan_of(
    state: ServerState,
    body: GenerationBody,
    prompts: Sequence["Tensor"],
    max_new_bytes: int,
    num_alternatives: int,
    stops: Sequence[str] = (),
) -> Plan:
    """
    Raises:
        ApiError, UserError: more is asked for than the limits allow, or a setting is not valid.
    """
    limits, model = state.limits, state.name_of(body.model)
    for ids in prompts:
        if len(ids) - 1 > limits.max_prompt_bytes:
            long = f"the prompt has {len(ids) - 1:,} bytes, and this server takes {limits.max_prompt_bytes:,}"
            raise ApiError(400, f"{long}; give a shorter one", "prompt", "context_length_exceeded")
    if max_new_bytes > limits.max_new_bytes:
        field = body.length_field
        message = f"{field}: {max_new_bytes:,} bytes are more than the {limits.max_new_bytes:,} of this server"
        raise ApiError(400, message, field)
    most = min(limits.max_samples, state.backend.places)
    if len(prompts) * body.num_samples > most:
        field, asked = "prompt", f"{len(prompts):,} prompts"
        if body.num_samples > 1:
            field = "n"
            asked = f"{body.num_samples:,} texts of {asked if len(prompts) > 1 else '1 prompt'}"
        raise ApiError(400, f"{field}: {asked} are more than the {most:,} of a request here", field)
    given = body.model_dump(include={"top_k", "top_p", "min_p"}, exclude_none=True)
    sampling = Sampling.parse(
        {
            **given,
            "temperature": DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
            "repetition_penalty": body.repetition_penalty or 1.0,
            "seed": secrets.randbits(63) if body.seed is None else body.seed,
            "stop": [*body.stops, *stops],
            "valid_utf8": bool(body.valid_utf8),
        }
    )
    if body.bytelatent:
        num_alternatives = num_alternatives or DEFAULT_ALTERNATIVES
    from bytelatent.serving.response_format import constraint_of

    # It may take a second, in which other requests are answered.
    constraint = await asyncio.to_thread(constraint_of, body.response_format, body.structured_outputs)
    return Plan(model, list(prompts), sampling, max_new_bytes, body.num_samples, num_alternatives, constraint)


@dataclass
class Inbox:
    """Updates from the engine's thread for a task of the event loop, which is woken only while it waits."""

    loop: asyncio.AbstractEventLoop
    items: deque[tuple[int, list["Update"]]] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _waits: bool = False

    def put(self, job: int, updates: list["Update"]) -> None:
        """From the engine's thread."""
        self.items.append((job, updates))
        if self._waits:
            self._waits = False
            with suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self._arrived.set)

    async def get(self, timeout: float) -> list[tuple[int, list["Update"]]]:
        """All that is there, once there is something.

        Raises:
            TimeoutError: nothing came.
        """
        while not self.items:
            self._arrived.clear()
            self._waits = True
            if not self.items:  # it may have come in between
                async with asyncio.timeout(timeout):
                    await self._arrived.wait()
        self._waits = False
        return [self.items.popleft() for _ in range(len(self.items))]


class Generation:
    """The choices of a request as they come.

    Attributes:
        texts: of each choice, the samples of a prompt together.
    """

    def __init__(self, state: ServerState, plan: Plan, record: RequestRecord):
        self.plan, self.limits, self.backend = plan, state.limits, state.backend
        self.texts = [ChoiceText() for _ in range(plan.num_choices)]
        self.record = record
        record.prompt_bytes = plan.prompt_bytes
        self._inbox = Inbox(asyncio.get_running_loop())
        self._tickets: list[Ticket] = []

    def submit(self) -> None:
        """
        Raises:
            ApiError: the queue is full. Nothing of the request stays in it.
        """
        from bytelatent.serving.scheduler import Job

        plan = self.plan
        about = (plan.sampling, plan.max_new_bytes, plan.samples, plan.num_alternatives, plan.constraint)
        try:
            for number, ids in enumerate(plan.prompts):
                job = Job(ids, *about)
                ticket = self.backend.submit(job, lambda new, number=number: self._inbox.put(number, new))
                self._tickets.append(ticket)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End what has not ended; its slots are free at the engine's next step."""
        if not all(text.ended for text in self.texts):
            for ticket in self._tickets:
                self.backend.scheduler.cancel(ticket)

    async def pieces(self) -> AsyncIterator[tuple[int, TextPiece]]:
        """What is new of each choice, with its index.

        Raises:
            ApiError: the model failed.
        """
        deadline, newest = time.monotonic() + self.limits.max_seconds, 0.0
        late = False
        while not all(text.ended for text in self.texts):
            left = deadline - time.monotonic()
            if left <= 0 and not late:
                late = True
                self.record.reason = f"ended after {self.limits.max_seconds:g} s"
                self.cancel()
            try:
                items = await self._inbox.get(30.0 if late else left)
            except TimeoutError:
                if late:
                    raise ApiError(500, "the engine does not answer") from None
                continue
            updates: dict[int, list[Update]] = {}
            for job, new in items:
                for update in new:
                    updates.setdefault(job * self.plan.samples + update.sample, []).append(update)
            for index, found in updates.items():
                if found[-1].ended == "failed":
                    failure = self._tickets[index // self.plan.samples].samples[found[-1].sample].failure
                    raise failure if isinstance(failure, UserError) else ApiError(500, found[-1].failure)
                before, piece = self.texts[index].num_bytes, self.texts[index].take(found)
                self.record.new_bytes += self.texts[index].num_bytes - before
                if piece.bytes:
                    self.record.first_byte()
                if piece.text or piece.finish_reason:
                    yield index, piece
            now = time.monotonic()
            if now - newest < INTERVAL_S:
                await asyncio.sleep(INTERVAL_S - (now - newest))
            newest = time.monotonic()

    def usage(self) -> Plain:
        prompt, completion = self.plan.prompt_bytes, sum(text.num_bytes for text in self.texts)
        read = [ticket.samples[0].prompt_patches for ticket in self._tickets] or [None]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "patches": {
                "prompt_patches": None if None in read else sum(count for count in read if count is not None),
                "completion_patches": sum(text.num_patches for text in self.texts),
            },
        }


@asynccontextmanager
async def generation(
    state: ServerState, plan: Plan, request: Request, generates: bool = True
) -> AsyncIterator[Generation]:
    """The jobs of a request, cancelled where the block ends before them; none where it only reads its prompts."""
    found = Generation(state, plan, record_of(request.scope))
    if generates:
        found.submit()
    try:
        yield found
    finally:
        found.cancel()


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Ends the block with `ClientGone` once the client has closed the connection."""
    task, is_gone = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if is_gone and not task.uncancel():
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """A time limit for what cannot be cut short, as a text can.

    Raises:
        ApiError: it was reached.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ApiError(400, f"it takes longer than the {seconds:g} s of this server; ask for less at once") from None


async def echoed(state: ServerState, plan: Plan) -> list[list[ByteInfo]]:
    """What the model predicts of the bytes of each prompt."""
    async with within(state.limits.max_seconds):
        return [await state.backend.read_prompt(ids, plan.num_alternatives) for ids in plan.prompts]
