"""The application: routes, errors, and the layers around them."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from bytelatent.errors import UserError
from bytelatent.serving import chat, completions, reading, service
from bytelatent.serving.errors import ApiError, as_api_error, as_bad_request
from bytelatent.serving.gate import Gate
from bytelatent.serving.page import mount_page
from bytelatent.serving.request_log import ID_HEADER, RequestLog, note
from bytelatent.serving.state import ServerState

ROUTERS = (completions.router, chat.router, reading.router, service.router)
DESCRIPTION = "A byte-level language model with dynamic patches, in OpenAI's shapes. Tokens are bytes."


def application(
    state: ServerState, keys: Sequence[bytes] = (), hosts: Sequence[str] = (), origins: Sequence[str] = ()
) -> ASGIApp:
    """
    Args:
        keys: API keys, of which a request needs one; none: it needs none.
        hosts: names by which the server may be called; none: any.
        origins: sites whose pages may call it from a browser.
    """
    app = FastAPI(title="bytelatent", version=state.version, description=DESCRIPTION, docs_url=None, redoc_url=None)
    app.state.server = state
    for router in ROUTERS:
        app.include_router(router)
    for kind in (HTTPException, UserError, Exception):
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_body)
    mount_page(app)
    app.openapi = lambda: _document(app)
    layered: ASGIApp = Gate(app, state.limits, keys, hosts, lambda: state.is_draining)
    if origins:
        how: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        layered = CORSMiddleware(layered, allow_origins=origins, expose_headers=[ID_HEADER, "Retry-After"], **how)
    return RequestLog(layered, state.metrics)


async def _refuse(request: Request, error: Exception) -> Response:
    found = as_api_error(error)
    if found.status_code in (404, 405) and not isinstance(error, ApiError):
        found = _no_such_route(request, found.status_code)
    note(request.scope, found)
    return found.response()


def _no_such_route(request: Request, status: int) -> ApiError:
    """What is wrong with an address that neither a route nor the page has."""
    path = request.url.path
    known: set[str] = set()
    for route in [route for router in ROUTERS for route in router.routes]:
        if isinstance(route, APIRoute) and route.path_regex.match(path):
            known |= set(route.methods or ())
    if status == 405 and not known:
        known = {"GET"}  # a file of the page
    if known and request.method not in known:
        allowed = ", ".join(sorted(known))
        return ApiError(405, f"{path} takes {allowed}, not {request.method}", headers={"Allow": allowed})
    return ApiError(404, f"there is no {path[:200]} here; /openapi.json lists what there is")


async def _refuse_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = as_bad_request(request, error)
    note(request.scope, found)
    return found.response()


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without FastAPI's answer 422, which is 400 here."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(name, None)
        app.openapi_schema = found
    return app.openapi_schema
