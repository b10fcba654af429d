"""The error object of every answer that is no success, as OpenAI's clients read it."""

from __future__ import annotations

from typing import Literal

from api.schemas.wire import Answer

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
]


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    """What is wrong and what to do about it, for people."""
    type: ErrorType
    """The class of the error, which follows from the answer's status.

    - `invalid_request_error`: Every other status below 500.
    - `authentication_error`: Status 401.
    - `permission_error`: Status 403.
    - `rate_limit_error`: Status 429.
    - `server_error`: Status 500 or more.
    """
    param: str | None
    """The field or parameter at fault, such as `method.type`. Null if it is not one of them."""
    code: str | None
    """The error's stable word for programs, such as `rate_limit_exceeded`.

    The list of error codes is in docs/errors.md and may grow.
    """


class Error(Answer):
    """The body of every answer whose status is 400 or more."""

    error: ErrorDetail
    """What went wrong, and which error it is."""
