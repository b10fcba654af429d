"""An endpoint whose transaction PostgreSQL undid is called again, in a new transaction. Any other is called once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import psycopg
import pytest
from psycopg import errors
from sqlalchemy.exc import OperationalError

from api.routing import Deferred, OneThreadRoute


class Calls:
    """An endpoint that fails a number of times, and the transactions that were opened for it."""

    def __init__(self, error: psycopg.Error, *, num_failures: int) -> None:
        self.num_opened = self.num_calls = 0
        self._error, self._num_failures = error, num_failures

    @contextmanager
    def open(self) -> Iterator[int]:
        self.num_opened += 1
        yield self.num_opened

    def endpoint(self, session: Any, **_body: Any) -> str:
        self.num_calls += 1
        assert session == self.num_opened == self.num_calls
        if self.num_calls <= self._num_failures:
            raise OperationalError("update", {}, self._error)
        return f"done in transaction {session}"

    def run(self, **arguments: Any) -> Any:
        route = OneThreadRoute("/", self.endpoint, response_model=None)
        return anyio.run(lambda: route.endpoint(session=Deferred(self.open), **arguments))


@pytest.mark.parametrize(
    "error", [errors.DeadlockDetected(), errors.SerializationFailure()], ids=lambda it: it.sqlstate
)
def test_what_postgresql_has_undone_is_tried_again_three_times_at_most(error: psycopg.Error) -> None:
    assert Calls(error, num_failures=2).run() == "done in transaction 3"
    hopeless = Calls(error, num_failures=3)
    with pytest.raises(OperationalError):
        hopeless.run()
    assert hopeless.num_calls == 3


def test_what_fails_otherwise_or_reads_its_body_from_the_wire_is_tried_once() -> None:
    timed_out = Calls(errors.LockNotAvailable(), num_failures=1)
    with pytest.raises(OperationalError):
        timed_out.run()
    reading = Calls(errors.DeadlockDetected(), num_failures=1)
    with pytest.raises(OperationalError):
        reading.run(body=iter([b"chunk"]))
    assert (timed_out.num_calls, reading.num_calls) == (1, 1)
