"""Errors as HTTP answers, the same for every route."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from lcm_compile.errors import LcmCompileError, LoraError, UsageError
from lcm_compile.serving.catalog import Catalog, UnknownModel
from lcm_compile.serving.dispatcher import QueueFull
from lcm_compile.serving.guard import error_body
from lcm_compile.serving.jobs import ClientGone, TooLate
from lcm_compile.serving.metrics import Metrics


def json_answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns JSON in ASCII, which has a form for every text of Python's."""
    return Response(json.dumps(content), status, headers, "application/json")


def status_of(error: Exception) -> tuple[int, str | None]:
    """Returns the HTTP status of an error, and the code that OpenAI's clients know it by."""
    match error:
        case UnknownModel():
            return 404, "model_not_found"
        case UsageError() | LoraError():
            return 400, "invalid_value"
        case QueueFull():
            return 429, "rate_limit_exceeded"
        case TooLate():
            return 504, "timeout"
    return 500, None


def text_of(error: LcmCompileError) -> str:
    """Returns an error with its hint, as one line."""
    return f"{error.message} ({error.hint})" if error.hint else error.message


def error_answer(error: LcmCompileError, catalog: Catalog) -> Response:
    """Returns the answer of an error."""
    status, code = status_of(error)
    headers = {"Retry-After": str(math.ceil(error.seconds))} if isinstance(error, QueueFull) else None
    text = catalog.without_folders(text_of(error))
    return json_answer(error_body(text, status, code), status, headers)


def validation_text(errors: list[Any]) -> str:
    """Returns pydantic's first errors in words, without the values, which may be anything."""
    parts = []
    for error in errors[:5]:
        place = ".".join(str(part) for part in error["loc"] if part != "body")
        parts.append(f"{place}: {error['msg']}" if place else str(error["msg"]))
    return "; ".join(parts)


def add_error_answers(app: FastAPI, metrics: Metrics, catalog: Catalog) -> None:
    """Makes an app answer errors with JSON that says what, why and what to do."""

    async def known(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, LcmCompileError)
        metrics.errors.labels(type(error).__name__).inc()
        return error_answer(error, catalog)

    async def invalid(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        status = 422 if request.url.path.startswith("/sdapi/") else 400
        return json_answer(error_body(validation_text([*error.errors()]), status, "invalid_value"), status)

    async def http(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return json_answer(error_body(str(error.detail), error.status_code), error.status_code, error.headers)

    async def gone(request: HttpRequest, error: Exception) -> Response:
        metrics.errors.labels("ClientGone").inc()
        return Response(status_code=499)  # nobody reads it

    app.add_exception_handler(LcmCompileError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)

    async def unexpected(request: HttpRequest, error: Exception) -> Response:
        metrics.errors.labels("Unexpected").inc()
        return json_answer(error_body("internal error; the server's log tells more", 500), 500)

    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, unexpected)
