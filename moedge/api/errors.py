"""OpenAI's error objects: what a client is told, and how exceptions become it. Knows no endpoint and no model."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

log = logging.getLogger("moedge.api")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class ErrorDetail(BaseModel):
    """What went wrong, for people (`message`) and programs (the rest)."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every response that is not a success, and of the last event of a stream that failed."""

    error: ErrorDetail


class ApiError(Exception):
    """A failure with its HTTP status. `message` names the thing, its value and the remedy."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.detail = ErrorDetail(
            message=message, type=TYPES.get(status, "invalid_request_error"), param=param, code=code
        )

    @property
    def body(self) -> str:
        return ErrorBody(error=self.detail).model_dump_json()

    def response(self) -> Response:
        return Response(self.body, self.status, self.headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Every failure of `app` answers with an error object."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_validation(error.errors()).response()


def from_validation(errors: Any) -> ApiError:
    """One of pydantic's complaints, without the input: an unknown name, which explains the others, or the first."""
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "unreadable")
        return ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")
    param = ".".join(place) or None
    unknown = first["type"] == "extra_forbidden"
    reason = "not a parameter here: leave it out" if unknown else first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param or 'the body'}: {reason}", param=param, code=first["type"])


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def _bug(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return ApiError(500, "the server failed; its log says why").response()


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an endpoint for its description: these failures, each with an error object."""
    return {status: {"model": ErrorBody} for status in statuses}


def as_event(error: ApiError) -> str:
    """The error as the data of a stream's event."""
    return json.dumps(json.loads(error.body) | {"status": error.status})
