"""Errors as HTTP answers, each with OpenAI's error object. Only this module knows which status an error has."""

from __future__ import annotations

from json import JSONDecodeError
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from api.metrics import count_refusal
from core.db.session import DATABASE_ERRORS, took_too_long
from core.domain.errors import (
    BusyError,
    ConflictError,
    DomainError,
    IdempotencyKeyReusedError,
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitedError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from core.domain.json_faults import explain_json_error
from core.storage import ObjectNotFoundError, StorageError

log = structlog.get_logger()

STATUSES: dict[type[DomainError], int] = {
    PayloadTooLargeError: 413,
    InvalidRequestError: 400,
    UnauthenticatedError: 401,
    PermissionDeniedError: 403,
    NotFoundError: 404,
    ConflictError: 409,
    IdempotencyKeyReusedError: 422,
    RateLimitedError: 429,
    UnsupportedError: 501,
    UnavailableError: 503,
    DomainError: 500,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
HTTP_CODES = {
    404: "unknown_url",
    405: "method_not_allowed",
    413: "payload_too_large",
    503: "unavailable",
}
_PLACES = {"body", "query", "path", "header", "cookie"}
_KINDS = {"int", "float", "str", "bool", "dict"}
# pydantic's complaints about a whole body, in words of the wire.
_BODY_WORDS = {
    "missing": "The body is missing: send a JSON object",
    "model_attributes_type": "The body is not a JSON object, sent as application/json",
}
_UNKNOWN_FIELD = "there is no such field"
_MAX_PARAM_CHARACTERS = 200
_RETRY_AFTER = {"retry-after": "2"}
_FINAL = {"x-should-retry": "false"}
# The same request would meet the same conflict again, so OpenAI's client must not retry. A limit passes with time.
_HEADERS: dict[type[DomainError], dict[str, str]] = {
    BusyError: {"retry-after": "5", "x-should-retry": "true"},
    ConflictError: _FINAL,
    UnsupportedError: _FINAL,
    RateLimitedError: {"retry-after": "10"},
    UnavailableError: _RETRY_AFTER,
}


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(DomainError, _answer_domain_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    for kind in (*DATABASE_ERRORS, StorageError):
        app.add_exception_handler(kind, _answer_unavailable)
    app.add_exception_handler(DataError, _answer_unstorable)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_bug)


def status_of(error: DomainError) -> int:
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def error_body(status: int, message: str, *, code: str | None, param: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")  # noqa: PLR2004
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_answer(
    status: int, message: str, *, code: str | None, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(error_body(status, message, code=code, param=param), status_code=status, headers=headers)


def _answer_domain_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, DomainError)
    status = status_of(error)
    count_refusal(error.code)
    headers = next((_HEADERS[kind] for kind in type(error).__mro__ if kind in _HEADERS), None)
    return error_answer(status, error.message, code=error.code, param=error.param, headers=headers)


def _answer_validation_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    param = _field_of(problems[0])
    # A field that may have several types has one complaint for each type. Together they say what it may be.
    complaints = " or ".join(
        dict.fromkeys(_complain(each, error.body) for each in problems if _field_of(each) == param)
    )
    message = f"{param}: {complaints}." if param else f"{complaints}."
    count_refusal("invalid_request")
    return error_answer(400, message, code="invalid_request", param=param)


def _complain(problem: dict[str, Any], body: Any) -> str:
    """Return what is wrong, as a sentence without its full stop."""
    kind = problem["type"]
    if kind == "json_invalid":
        return _explain_json(problem, body)
    if kind == "extra_forbidden":
        return _UNKNOWN_FIELD
    return str(_BODY_WORDS.get(kind, problem["msg"]) if _field_of(problem) is None else problem["msg"])


def _explain_json(problem: dict[str, Any], body: Any) -> str:
    """Return the JSON parser's error in words. FastAPI passes its position as if it were a field's name."""
    position = problem["loc"][-1]
    fault = explain_json_error(JSONDecodeError(problem["ctx"]["error"], str(body), position))
    where = f"Line {fault.line}, column {fault.column}"
    return f"The body is not JSON. {where}: {fault.what}. {fault.hint}".removesuffix(".")


def _field_of(problem: dict[str, Any]) -> str | None:
    """Return the dotted name of the field at fault, without pydantic's names of types.

    The first part is always a field's name. So is the last part if the field is unknown.
    """
    if problem["type"] == "json_invalid":
        return None
    parts = [str(part) for part in problem["loc"]]
    parts = parts[1:] if parts[:1] and parts[0] in _PLACES else parts
    sent = parts[-1:] if problem["type"] == "extra_forbidden" and len(parts) > 1 else []
    inner = [part for part in parts[1 : len(parts) - len(sent)] if _is_name(part)]
    name = ".".join([*parts[:1], *inner, *sent])
    return name.encode("utf-8", "backslashreplace").decode()[:_MAX_PARAM_CHARACTERS] or None


def _is_name(part: str) -> bool:
    return (part.isidentifier() and part not in _KINDS) or part.isdigit()


def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer an error of the framework, or a domain error that was raised as the cause of one."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, DomainError):
        return _answer_domain_error(request, error.__cause__)
    message = f"{error.detail}: {request.method} {request.url.path[:200]}"
    code = HTTP_CODES.get(error.status_code, "http_error")
    count_refusal(code)
    return error_answer(error.status_code, message, code=code, headers=dict(error.headers or {}))


def _answer_unavailable(_request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, ObjectNotFoundError):
        count_refusal("not_found")
        return error_answer(404, "The content is gone.", code="not_found")
    if took_too_long(error):
        return _answer_too_long()
    count_refusal("unavailable")
    log.warning("dependency.unavailable", error=type(error).__name__)
    return error_answer(503, "The service is not ready; try again.", code="unavailable", headers=_RETRY_AFTER)


def _answer_too_long() -> JSONResponse:
    """Answer a statement that met a time limit of the database. The same request would meet it again."""
    count_refusal("statement_timeout")
    log.error("statement.timed_out")
    message = "The database gave up on a statement that took too long. Ask for less: a smaller `limit`, or one thing."
    return error_answer(504, message, code="statement_timeout", headers=_FINAL)


def _answer_nobody(_request: Request, _error: Exception) -> JSONResponse:
    """Answer a client that has closed its connection within its body. The answer is not read."""
    log.info("request.abandoned")
    return error_answer(400, "The body has ended early.", code="body_cut")


def _answer_unstorable(_request: Request, error: Exception) -> JSONResponse:
    count_refusal("invalid_request")
    log.info("request.unstorable", error=type(error.__cause__).__name__)
    return error_answer(400, "A value holds what cannot be stored, such as a NUL.", code="invalid_request")


def _answer_bug(_request: Request, error: Exception) -> JSONResponse:
    log.error("request.failed", exc_info=error)
    return error_answer(500, "Something went wrong on our side.", code="internal_error")
