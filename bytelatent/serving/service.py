"""The server about itself: models, health, metrics."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from bytelatent.serving.answers import Health, ModelCard, ModelList, Plain
from bytelatent.serving.completions import ERRORS
from bytelatent.serving.state import ServerState, server_state

METRICS = "text/plain; version=0.0.4"

router = APIRouter(responses=ERRORS)


def _card(state: ServerState, name: str) -> Plain:
    return {"id": name, "object": "model", "created": state.began, "owned_by": "bytelatent"}


@router.get("/v1/models", response_model=ModelList)
async def list_models(request: Request) -> Plain:
    """The names of the model."""
    state = server_state(request)
    return {"object": "list", "data": [_card(state, name) for name in state.names]}


@router.get("/v1/models/{name:path}", response_model=ModelCard)
async def show_model(name: str, request: Request) -> Plain:
    """Whether there is a model of this name."""
    state = server_state(request)
    return _card(state, state.name_of(name))


def _health(state: ServerState) -> Plain:
    return {"status": state.status, "model": state.names[0], "version": state.version}


@router.get("/health", response_model=Health)
async def health(request: Request) -> Response:
    """Whether the server lives: 200, also while it loads or drains, unless the model could not be loaded."""
    state = server_state(request)
    return JSONResponse(_health(state), 503 if state.status == "failed" else 200)


@router.get("/ready", response_model=Health, responses={503: {"model": Health}})
async def ready(request: Request) -> Response:
    """Whether it takes requests: 200, else 503."""
    state = server_state(request)
    return JSONResponse(_health(state), 200 if state.status == "ready" else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return PlainTextResponse(server_state(request).metrics.text(), media_type=METRICS)
