"""Errors as OpenAI's API gives them: `{"error": {"message", "type", "param", "code"}}`, for every status."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from bytelatent.config import one_line_of
from bytelatent.errors import UserError, in_one_line

GONE = 499  # in the log and the metrics only: the client closed the connection before it had its answer
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "invalid_host",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    500: "internal_error",
    503: "unavailable",
}
LONGEST = 1000  # characters of a message


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every error is."""

    error: ErrorDetail


class ApiError(HTTPException):
    """A request that gets an error.

    Args:
        param: the field of the request that is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        self.message, self.param, self.code = in_one_line(message)[:LONGEST], param, code or CODES.get(status)
        super().__init__(status, self.message, dict(headers or {}))

    def body(self) -> dict[str, Any]:
        status = self.status_code
        kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        content = json.dumps(self.body()).encode()  # ASCII: a message may hold half of a surrogate pair
        return Response(content, self.status_code, self.headers, media_type="application/json")


class ClientGone(ApiError):
    """The client closed the connection; nobody waits for an answer."""

    def __init__(self) -> None:
        super().__init__(GONE, "the client closed the connection", code="client_gone")


def as_api_error(error: Exception) -> ApiError:
    """What a client gets for an error that a route has raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        message = str(error)
        param = message.partition(":")[0]
        return ApiError(400, message, param if param.replace(".", "").isidentifier() else None)
    if isinstance(error, HTTPException):
        if error.status_code == 400:
            return ApiError(400, "the body is no JSON text in UTF-8", code="invalid_json")
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "the server failed; its log says why")


def as_bad_request(request: Request, error: RequestValidationError) -> ApiError:
    """A body that does not fit its model, as one line about its first wrong field."""
    problems = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}", code="invalid_json")
    if first["loc"]:
        return ApiError(400, one_line_of(body_model(request), problems), str(first["loc"][0]))
    if first["type"] == "value_error":  # of several fields; it names one
        return as_api_error(UserError(str(first["ctx"]["error"])))
    if first["type"] == "missing":
        return ApiError(400, "the body is empty; send a JSON object", code="invalid_json")
    if isinstance(first.get("input"), bytes):
        return ApiError(415, "the body is read as JSON only; send the header Content-Type: application/json")
    return ApiError(400, "the body is no JSON object", code="invalid_json")


def body_model(request: Request) -> type[BaseModel]:
    [parameter] = request.scope["route"].dependant.body_params
    return parameter.field_info.annotation
