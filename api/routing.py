"""Routes that do their work with the database in one stay in one thread.

A dependency that opens a transaction would enter it in one thread, leave it in another, and each change of threads
costs a request more than a statement. Besides, a transaction that needs another thread to end waits for those that wait
for its locks. So a dependency only says which transaction a route wants; it begins and is committed around the endpoint.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from fastapi.routing import APIRoute


@dataclass(frozen=True)
class Deferred:
    """A context that the endpoint's own thread enters, to hand over what it yields."""

    context: AbstractContextManager[Any]


class OneThreadRoute(APIRoute):
    """A route whose endpoint, if it is a plain function, is given what its `Deferred` arguments yield."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, _entering(endpoint), **options)


def _entering(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(endpoint) or inspect.isasyncgenfunction(endpoint):
        return endpoint

    @functools.wraps(endpoint)
    def run(**arguments: Any) -> Any:
        with ExitStack() as contexts:
            for name, value in arguments.items():
                if isinstance(value, Deferred):
                    arguments[name] = contexts.enter_context(value.context)
            return endpoint(**arguments)

    return run
