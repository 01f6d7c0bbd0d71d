"""What is not OpenAI's: patches and scores of texts, and texts as ids."""

from fastapi import APIRouter
from starlette.requests import Request

from bytelatent.inference.settings import LIMITS
from bytelatent.serving.answers import Detokenized, PatchesAnswer, Plain, ScoreAnswer, Tokens
from bytelatent.serving.completions import ERRORS
from bytelatent.serving.errors import ApiError
from bytelatent.serving.generation import while_connected, within
from bytelatent.serving.request_log import record_of
from bytelatent.serving.shapes import OTHER_MODES, DetokenizeRequest, PatchesRequest, ScoreRequest, TokenizeRequest
from bytelatent.serving.state import server_state
from bytelatent.vocab import decode, encode, to_bytes

router = APIRouter(responses=ERRORS)


@router.post("/v1/patches", response_model=PatchesAnswer)
async def patches(body: PatchesRequest, request: Request) -> Plain:
    """Where patches begin in a text."""
    state = server_state(request)
    state.name_of(body.model)
    backend = state.backend
    data = backend.text_bytes(body.text)
    record_of(request.scope).prompt_bytes = len(data)
    async with while_connected(request.receive), within(state.limits.max_seconds):
        modes = OTHER_MODES if body.modes is None else body.modes
        return await backend.patches(data, modes, body.threshold, body.patches is not False)


@router.post("/v1/score", response_model=ScoreAnswer)
async def score(body: ScoreRequest, request: Request) -> Plain:
    """Bits per byte of texts, and the log-probabilities of their bytes."""
    state = server_state(request)
    name, backend, limits = state.name_of(body.model), state.backend, state.limits
    texts = [backend.text_bytes(text) for text in ([body.texts] if isinstance(body.texts, str) else body.texts)]
    if too_long := [data for data in texts if len(data) > limits.max_prompt_bytes]:
        long = f"a text has {len(too_long[0]):,} bytes, and this server takes {limits.max_prompt_bytes:,}"
        raise ApiError(400, f"{long}; give a shorter one", "texts", "context_length_exceeded")
    size = record_of(request.scope).prompt_bytes = sum(map(len, texts))
    ends = True if body.end is None else body.end
    async with while_connected(request.receive), within(limits.max_seconds):
        data = await backend.score(texts, ends, bool(body.log_probabilities))
    patches = {"prompt_patches": sum(found["patches"] for found in data), "completion_patches": 0}
    return {
        "object": "list",
        "model": name,
        "data": [{"index": index, **found} for index, found in enumerate(data)],
        "usage": {"prompt_tokens": size, "completion_tokens": 0, "total_tokens": size, "patches": patches},
    }


@router.post("/tokenize", response_model=Tokens)
async def tokenize(body: TokenizeRequest, request: Request) -> Plain:
    """The ids of a text: each byte is the id byte + 4, after BOS, which is 1."""
    state = server_state(request)
    state.name_of(body.model)
    data = to_bytes(body.prompt)
    special = body.add_special_tokens is None or body.add_special_tokens
    ids = encode(data, bos=special, eos=False).tolist()
    longest = min(state.limits.max_prompt_bytes, LIMITS["context"])
    return {"count": len(ids), "max_model_len": longest, "tokens": ids, "bytes": list(data)}


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(body: DetokenizeRequest, request: Request) -> Plain:
    """The text of ids; special ids are left out, and U+FFFD takes the place of bytes that are no UTF-8."""
    server_state(request).name_of(body.model)
    data = decode(body.tokens)
    return {"prompt": data.decode("utf-8", "replace"), "bytes": list(data)}
