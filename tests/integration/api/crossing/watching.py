"""The application under watch: its answers, and its queries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import Engine, event, text

from api.auth import Authenticator
from api.main import create_app
from api.resources import resources_of
from core.db.base import Row
from core.db.session import service_transaction
from core.settings import ApiSettings
from local.servers import ServerAddresses
from tests.factories.tenants import Tenant

CHANGING_HEADERS = {"x-request-id", "date", "ratelimit"}
TENANT_TABLES = sorted(name for name, table in Row.metadata.tables.items() if "tenant_id" in table.c)


@dataclass
class Watched:
    """One running application, and what it asks its database."""

    client: TestClient
    statements: list[str] = field(default_factory=list)
    num_stripped: int = 0
    is_stripping: bool = False
    known: set[str] = field(default_factory=set)

    def ask(self, verb: str, path: str, tenant: Tenant, **options: Any) -> Response:
        """Send a request with the tenant's key, which is known already: finding out about it is not counted."""
        headers = {"authorization": f"Bearer {tenant.api_key}"}
        self._refresh(headers["authorization"])
        self.statements.clear()
        return self.client.request(verb, path, headers=headers, **options)

    def _refresh(self, authorization: str) -> None:
        """Make sure that the application has looked the key up, once: here it believes a key for ever."""
        if authorization in self.known:
            return
        state: Any = self.client.app.state  # type: ignore[attr-defined]
        was_stripping, self.is_stripping = self.is_stripping, False
        authenticator = Authenticator(state.resources.engine)
        authenticator.identify(authorization)
        state.resources = replace(state.resources, authenticator=authenticator)
        self.known = {authorization}
        self.is_stripping = was_stripping


_FILTER = re.compile(r"\b\w+\.tenant_id = %\(\w+\)s(::UUID)?")


@contextmanager
def running(database_url: str, addresses: ServerAddresses) -> Iterator[Watched]:
    storage = addresses.storage
    settings = ApiSettings(
        database_url=database_url,
        s3_endpoint=storage.endpoint,
        s3_access_key=storage.access_key,
        s3_secret_key=storage.secret_key,
        s3_bucket=storage.bucket,
    )
    app: FastAPI = create_app(settings)
    with (
        pytest.MonkeyPatch.context() as patch,
        TestClient(app, raise_server_exceptions=False) as client,
    ):
        patch.setattr("api.auth.TTL_SECONDS", 3600.0)
        watched = Watched(client)

        @event.listens_for(resources_of(app).engine, "before_cursor_execute", retval=True)
        def watch(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> tuple[str, Any]:
            if not statement.startswith(
                "SELECT clock_timestamp()"
            ):  # by which the process reads the database's time, now and then
                watched.statements.append(statement)
            if watched.is_stripping:
                statement, number = _FILTER.subn("true", statement)
                watched.num_stripped += number
            return statement, parameters

        yield watched
        resources_of(app).engine.dispose()


def seen(answer: Response, wire_id: str) -> tuple[int, str, dict[str, str]]:
    """Return everything of an answer that a caller can see, with the id it asked for made anonymous."""
    headers = {name: value for name, value in answer.headers.items() if name not in CHANGING_HEADERS}
    return answer.status_code, answer.text.replace(wire_id, "ID"), headers


def snapshot(owner: Engine, tenant: Tenant) -> dict[str, list[str]]:
    """Return every row of a tenant, as text."""
    with service_transaction(owner) as session:
        return {
            name: list(
                session.scalars(
                    text(f"select to_jsonb(t)::text from {name} t where tenant_id = :id order by 1"), {"id": tenant.id}
                )
            )
            for name in TENANT_TABLES
            if name != "api_keys"  # notes when its keys are used
        }
