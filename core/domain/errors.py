"""The tree of errors a tenant may be shown.

    DomainError
    |- InvalidRequestError      the request is wrong and will stay wrong
    |  '- PayloadTooLargeError  ... because it passes a cap
    |- UnauthenticatedError     no API key, or not a live one
    |- PermissionDeniedError    a live key that may not do this
    |- NotFoundError            no such thing for this tenant (another tenant's thing is no thing)
    |- ConflictError            the thing's present state forbids this
    |  '- BusyError             ... and is about to change: ask again
    |- IdempotencyKeyReusedError  an Idempotency-Key that stands for another request
    |- RateLimitedError         too much or too fast; later may work
    |- UnsupportedError         a call of OpenAI's that this service does not have
    '- UnavailableError         our fault, and passing

`code` is public and stable; `param` names the field to change. Only `api/errors.py` knows HTTP statuses.
"""

from __future__ import annotations


class DomainError(Exception):
    """An error whose message may be shown to the tenant unchanged."""

    default_code = "error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        # Pickle's default would lose keyword-only arguments, and errors are sent between processes.
        return (_restore_error, (type(self), self.message, self.code, self.param))


def _restore_error(kind: type[DomainError], message: str, code: str, param: str | None) -> DomainError:
    return kind(message, code=code, param=param)


class InvalidRequestError(DomainError):
    default_code = "invalid_request"


class PayloadTooLargeError(InvalidRequestError):
    default_code = "payload_too_large"


class UnauthenticatedError(DomainError):
    default_code = "invalid_api_key"


class PermissionDeniedError(DomainError):
    default_code = "permission_denied"


class NotFoundError(DomainError):
    default_code = "not_found"


class ConflictError(DomainError):
    default_code = "conflict"


class BusyError(ConflictError):
    default_code = "busy"


class IdempotencyKeyReusedError(DomainError):
    default_code = "idempotency_key_reused"


class RateLimitedError(DomainError):
    default_code = "rate_limited"


class UnsupportedError(DomainError):
    default_code = "not_supported"


class UnavailableError(DomainError):
    default_code = "unavailable"
