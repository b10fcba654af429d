"""Routes that run in one thread: the transaction, the endpoint, and the JSON of the answer.

A dependency that opens a transaction would enter it in one thread and leave it in another. Each change of threads costs
more than a statement. Worse, a transaction that needs another thread to end may wait for requests that wait for its
locks. So a dependency returns a `Deferred`, which says which transaction the route wants, and the endpoint's own thread
opens it for as long as the endpoint runs.

An endpoint is called again in two cases. PostgreSQL undoes one of two transactions that block each other. Or the
endpoint finds that something long must be done first: that runs without a transaction and outside the shared threads.

Long work runs in the threads of its gate (see `admission`). Short work shares Starlette's 40 threads, and one tenant
never has more than SHARE_OF_TENANT of them, so it delays only its own requests. No request uses these threads before
its tenant is known: keys are looked up in threads of their own (see `auth`), and so is the database's health.
"""

from __future__ import annotations

import functools
import inspect
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakValueDictionary

import structlog
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Request, Response
from fastapi.params import Depends as Dependency
from fastapi.routing import APIRoute
from pydantic import BaseModel

from api.admission import Gate
from core.db.session import DATABASE_ERRORS, state_of
from core.domain.api_keys import Identity

log = structlog.get_logger()

_MAX_TRIES = 3
SHARE_OF_TENANT = 6
_shares: WeakValueDictionary[uuid.UUID, CapacityLimiter] = WeakValueDictionary()
_UNDONE_STATES = ("40P01", "40001")  # SQLSTATEs: deadlock_detected, serialization_failure


@dataclass(frozen=True)
class Deferred:
    """A context that the endpoint's own thread enters, once for each try. The endpoint gets what it yields."""

    open: Callable[[], AbstractContextManager[Any]]


class PrerequisiteError(Exception):
    """Raised by an endpoint when long work must be done first, in threads of its own.

    The transaction is undone, the work is done, and the endpoint is called again. The work waits for the tenant's share
    first and for one of its threads then, so one tenant never delays the others.
    """

    def __init__(self, work: Callable[[], None], *, limiter: CapacityLimiter) -> None:
        super().__init__(work)
        self.work, self.limiter = work, limiter


class Door(ABC):
    """A dependency that decides whether the caller may pass. It is asked before the body is read."""

    @abstractmethod
    async def __call__(self, request: Request) -> None:
        """Return if the caller may pass, and raise the answer's error if not."""


class OneThreadRoute(APIRoute):
    """A route whose endpoint, if it is a plain function, gets what its `Deferred` arguments yield."""

    def __init__(
        self,
        path: str,
        endpoint: Callable[..., Any],
        *,
        dependencies: Sequence[Dependency] | None = None,
        **options: Any,
    ) -> None:
        asked = [each.dependency for each in dependencies or ()]
        self._doors = [each for each in asked if isinstance(each, Door)]
        gate = next((each for each in asked if isinstance(each, Gate)), None)
        is_plain = not (inspect.iscoroutinefunction(endpoint) or inspect.isasyncgenfunction(endpoint))
        run = _in_one_thread(endpoint, gate) if is_plain else endpoint
        super().__init__(path, run, dependencies=dependencies, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        if self.body_field is None:
            return answer

        async def pass_doors(request: Request) -> Response:
            for door in self._doors:
                await door(request)
            return await answer(request)

        return pass_doors


class Router(APIRouter):
    """A router all of whose routes stay in one thread, behind the same doors."""

    def __init__(self, prefix: str = "", *, tag: str, doors: Sequence[Door] = ()) -> None:
        dependencies = [cast("Dependency", Depends(door)) for door in doors]
        super().__init__(prefix=prefix, tags=[tag], dependencies=dependencies, route_class=OneThreadRoute)


def _in_one_thread(endpoint: Callable[..., Any], gate: Gate | None) -> Callable[..., Coroutine[Any, Any, Any]]:
    def work(arguments: dict[str, Any]) -> Any:
        answer = _call_until_done(endpoint, arguments)
        return _as_json(answer, arguments.get("response")) if isinstance(answer, BaseModel) else answer

    @functools.wraps(endpoint)
    async def run(**arguments: Any) -> Any:
        if gate is not None:
            return await to_thread.run_sync(work, arguments, limiter=gate.threads)
        while True:
            try:
                async with share_of(arguments.get("caller")):
                    return await to_thread.run_sync(work, arguments)
            except PrerequisiteError as first:
                async with share_of(arguments.get("caller")):
                    await to_thread.run_sync(first.work, limiter=first.limiter)

    return run


def share_of(caller: Identity | None) -> AbstractAsyncContextManager[None]:
    """Return what a tenant's request holds while it runs in a shared thread. An operator's request holds nothing."""
    if caller is None:
        return nullcontext()
    share = _shares.get(caller.tenant_id)
    if share is None:
        share = _shares[caller.tenant_id] = CapacityLimiter(SHARE_OF_TENANT)
    return share


def _call_until_done(endpoint: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    is_body_streamed = any(
        isinstance(value, Iterator) for value in arguments.values()
    )  # a streamed body can be read once only
    for _ in range(1, _MAX_TRIES):
        try:
            return _call(endpoint, arguments)
        except DATABASE_ERRORS as error:
            state = state_of(error)
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
    """Return the answer with the headers that its endpoint has set. FastAPI would validate it again, field by field."""
    response = Response(answer.model_dump_json(), media_type="application/json")
    if told is not None:
        response.headers.update(told.headers)
    return response
