"""Routes that are done in one stay in one thread: their transaction, their endpoint, and the JSON of their answer.

A dependency that opens a transaction would enter it in one thread and leave it in another, and each change of threads
costs a request more than a statement. Besides, a transaction that needs another thread to end waits for those that wait
for its locks. So a dependency only says which transaction a route wants, which lasts as long as the endpoint does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel


@dataclass(frozen=True)
class Deferred:
    """A context that the endpoint's own thread enters, to hand over what it yields."""

    context: AbstractContextManager[Any]


class OneThreadRoute(APIRoute):
    """A route whose endpoint, if it is a plain function, is given what its `Deferred` arguments yield."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        is_plain = not (inspect.iscoroutinefunction(endpoint) or inspect.isasyncgenfunction(endpoint))
        super().__init__(path, _in_one_thread(endpoint) if is_plain else endpoint, **options)


def _in_one_thread(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(endpoint)
    def run(**arguments: Any) -> Any:
        with ExitStack() as contexts:
            for name, value in arguments.items():
                if isinstance(value, Deferred):
                    arguments[name] = contexts.enter_context(value.context)
            answer = endpoint(**arguments)
        return _as_json(answer, arguments.get("response")) if isinstance(answer, BaseModel) else answer

    return run


def _as_json(answer: BaseModel, told: Response | None) -> Response:
    """Return an answer with the headers that its endpoint has set. FastAPI would check it once more, field by field."""
    response = Response(answer.model_dump_json(), media_type="application/json")
    if told is not None:
        response.headers.update(told.headers)
    return response
