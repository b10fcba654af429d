"""A process is ready on a schema that is as new as its code, or newer, and says what to do on an older one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
from sqlalchemy import Engine, text

from core.db.readiness import check_database
from core.db.revisions import list_revisions
from core.db.session import connect
from core.domain.errors import UnavailableError
from local.ports import free_ports
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.tenants import Tenant
from tests.faults import Cut, FaultProxy, Hang
from tests.processes import running_api, storage_settings
from tests.waiting import PATIENCE_SECONDS, wait_until

NEWEST = list_revisions()[-1]
TOO_OLD = f"The schema is at 0019 and this version needs {NEWEST}: run espalier migrate."
UNREADABLE = f"The schema is missing or too old, and this version needs {NEWEST}: run espalier migrate."
READERS = "espalier_api, espalier_worker, espalier_schedule"


@contextmanager
def changed(owner: Engine, change: str, *, back: str) -> Iterator[None]:
    with owner.begin() as connection:
        connection.execute(text(change))
    try:
        yield
    finally:
        with owner.begin() as connection:
            connection.execute(text(back))


def at_revision(revision: str) -> dict[str, str]:
    set_revision = "update alembic_version set version_num = '{}'"
    return {"change": set_revision.format(revision), "back": set_revision.format(NEWEST)}


UNREADABLES = {
    "no schema": {
        "change": "alter table alembic_version rename to gone",
        "back": "alter table gone rename to alembic_version",
    },
    "from before the grant": {
        "change": f"revoke select on alembic_version from {READERS}",
        "back": f"grant select on alembic_version to {READERS}",
    },
    "no revision": {
        "change": "delete from alembic_version",
        "back": f"insert into alembic_version values ('{NEWEST}')",
    },
}


def ask(port: int) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False, timeout=PATIENCE_SECONDS)


def test_an_api_on_an_older_schema_says_on_both_ports_that_it_must_be_migrated(
    database: Database, servers: ServerAddresses, owner: Engine
) -> None:
    port, management = free_ports(2)
    env = {"ESPALIER_MANAGEMENT_PORT": str(management)}
    with running_api(database.api_url, servers.storage, port=port, env=env):
        with changed(owner, **at_revision("0019")):
            wait_until(lambda: ask(port).status_code == httpx.codes.SERVICE_UNAVAILABLE)
            answer = ask(port)
            assert answer.json()["error"]["message"] == TOO_OLD
            assert answer.headers["retry-after"]
            assert (ask(management).status_code, ask(management).text) == (503, f"{TOO_OLD}\n")
        wait_until(lambda: ask(port).is_success and ask(management).is_success)
        with changed(owner, **at_revision(f"{int(NEWEST) + 1:04}")):
            wait_until(lambda: ask(management).text == "ok\n", what="the next answer")


@pytest.mark.parametrize("role", ["api", "worker", "schedule"])
def test_each_role_sees_which_schema_it_is_on(database: Database, owner: Engine, role: str) -> None:
    engine = connect(getattr(database, f"{role}_url"))
    check_database(engine)
    with changed(owner, **at_revision("0019")), pytest.raises(UnavailableError, match=TOO_OLD):
        check_database(engine)
    with changed(owner, **at_revision("10000")):
        check_database(engine)
    engine.dispose()


@pytest.mark.parametrize("state", UNREADABLES.values(), ids=UNREADABLES.keys())
def test_a_schema_that_does_not_tell_its_revision_is_too_old(
    database: Database, owner: Engine, state: dict[str, str]
) -> None:
    engine = connect(database.api_url)
    with changed(owner, **state), pytest.raises(UnavailableError, match=UNREADABLE):
        check_database(engine)
    engine.dispose()


def test_an_api_whose_store_goes_away_serves_what_needs_no_objects_and_says_so(
    database: Database, servers: ServerAddresses, tenant: Tenant
) -> None:
    keys = {"authorization": f"Bearer {tenant.api_key}"}
    with FaultProxy(int(servers.storage.endpoint.rpartition(":")[2])) as proxy:
        port, management = free_ports(2)
        jobs_url = f"http://127.0.0.1:{port}/v1/fine_tuning/jobs"
        storage = replace(servers.storage, endpoint=f"127.0.0.1:{proxy.port}")
        with running_api(database.api_url, storage, port=port, env={"ESPALIER_MANAGEMENT_PORT": str(management)}):
            wait_until(lambda: ask(management).text == "ok\n")
            for fault in (Cut(), Hang()):
                with proxy.during(fault):
                    wait_until(lambda: ask(port).json().get("code") == "storage_unavailable", what="the trouble")
                    assert (ask(port).status_code, ask(port).json()["status"]) == (200, "degraded")
                    wait_until(lambda: ask(management).text.startswith("degraded: The object store "), what="it here")
                    assert httpx.get(jobs_url, headers=keys, trust_env=False, timeout=PATIENCE_SECONDS).is_success
                wait_until(lambda: ask(port).json() == {"status": "ok"}, what="the end of it")


def test_an_api_that_never_reached_its_bucket_is_not_ready(database: Database, servers: ServerAddresses) -> None:
    (port,) = free_ports(1)
    env = {
        **os.environ,
        "ESPALIER_DATABASE_URL": database.api_url,
        **storage_settings(servers.storage),
        "ESPALIER_S3_BUCKET": "no-such-bucket",
        "ESPALIER_API_PORT": str(port),
    }
    with subprocess.Popen([sys.executable, "-m", "api"], env=env) as process:
        try:
            wait_until(lambda: answers(port), what="the API")
            answer = ask(port)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
            assert "no-such-bucket" in answer.json()["error"]["message"]
            assert answer.headers["retry-after"]
        finally:
            process.terminate()


def answers(port: int) -> bool:
    try:
        return bool(ask(port).status_code)
    except httpx.TransportError:
        return False
