"""Routes that are done in one stay in one thread: their transaction, their endpoint, and the JSON of their answer.

A dependency that opens a transaction would enter it in one thread and leave it in another, and each change of threads
costs a request more than a statement. Besides, a transaction that needs another thread to end waits for those that wait
for its locks. So a dependency only says which transaction a route wants, which lasts as long as the endpoint does.

Of two transactions that cannot both go on, PostgreSQL undoes one whole. Its endpoint is called again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import structlog
from fastapi import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from sqlalchemy.exc import OperationalError

log = structlog.get_logger()

_MAX_TRIES = 3
_UNDONE_STATES = ("40P01", "40001")  # SQLSTATEs: deadlock_detected, serialization_failure


@dataclass(frozen=True)
class Deferred:
    """How to make a context that the endpoint's own thread enters, once a try, to hand over what it yields."""

    open: Callable[[], AbstractContextManager[Any]]


class OneThreadRoute(APIRoute):
    """A route whose endpoint, if it is a plain function, is given what its `Deferred` arguments yield."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        is_plain = not (inspect.iscoroutinefunction(endpoint) or inspect.isasyncgenfunction(endpoint))
        super().__init__(path, _in_one_thread(endpoint) if is_plain else endpoint, **options)


def _in_one_thread(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(endpoint)
    def run(**arguments: Any) -> Any:
        answer = _call_until_done(endpoint, arguments)
        return _as_json(answer, arguments.get("response")) if isinstance(answer, BaseModel) else answer

    return run


def _call_until_done(endpoint: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    is_body_streamed = any(isinstance(value, Iterator) for value in arguments.values())  # it can be read once only
    for _ in range(1, _MAX_TRIES):
        try:
            return _call(endpoint, arguments)
        except OperationalError as error:
            state = getattr(error.orig, "sqlstate", None)
            if is_body_streamed or state not in _UNDONE_STATES:
                raise
            log.warning("transaction.undone", sqlstate=state)
    return _call(endpoint, arguments)


def _call(endpoint: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    with ExitStack() as contexts:
        opened = {
            name: contexts.enter_context(value.open()) if isinstance(value, Deferred) else value
            for name, value in arguments.items()
        }
        return endpoint(**opened)


def _as_json(answer: BaseModel, told: Response | None) -> Response:
    """Return an answer with the headers that its endpoint has set. FastAPI would check it once more, field by field."""
    response = Response(answer.model_dump_json(), media_type="application/json")
    if told is not None:
        response.headers.update(told.headers)
    return response
