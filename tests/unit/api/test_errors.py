"""An error of a server that the service needs is temporary: the answer says when to retry."""

from __future__ import annotations

import psycopg
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from api.errors import STATUSES, error_body, install_error_handlers
from api.schemas.errors import Error
from core.db.connections import SilentServerError
from core.db.session import DATABASE_ERRORS
from core.storage import StorageUnavailableError

ERRORS = [
    InterfaceError("select 1", {}, Exception("the connection is closed")),
    InternalError("commit", {}, Exception("terminating connection due to idle-in-transaction timeout")),
    OperationalError("select 1", {}, Exception("server closed the connection")),
    PoolTimeoutError("QueuePool limit reached"),
    psycopg.InterfaceError("the connection is closed"),
    psycopg.OperationalError("server closed the connection"),
    psycopg.errors.ReadOnlySqlTransaction("cannot execute UPDATE in a read-only transaction"),
    SilentServerError("The server has not answered for 10 s."),
    StorageUnavailableError("The object store did not answer."),
]


def test_every_error_of_the_database_is_among_them() -> None:
    assert {kind for kind in DATABASE_ERRORS if not any(isinstance(error, kind) for error in ERRORS)} == set()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__module__}.{type(error).__name__}")
def test_it_is_answered_503_and_a_time_to_come_again(error: Exception) -> None:
    app = FastAPI()
    install_error_handlers(app)

    @app.get("/")
    def fail() -> None:
        raise error

    answer = TestClient(app, raise_server_exceptions=False).get("/")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert answer.json()["error"]["code"] == "unavailable"


@pytest.mark.parametrize("status", sorted({*STATUSES.values(), 404, 405, 504}))
def test_every_error_is_the_object_that_the_document_describes(status: int) -> None:
    body = error_body(status, "No.", code="no", param="model")
    assert Error.model_validate(body).model_dump() == body
