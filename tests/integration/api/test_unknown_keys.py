"""Requests with no key, or an unknown one, take no thread from requests with a valid one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import psycopg
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event

from api.auth import ACQUAINTANCES, STRANGERS, Authenticator
from api.main import create_app
from api.resources import resources_of
from core.db.session import connect
from core.domain.api_keys import OPERATOR_PREFIX, generate_api_key
from core.domain.errors import UnauthenticatedError
from core.settings import ApiSettings
from local.servers import ServerAddresses
from tests.databases import Database, num_waiting
from tests.factories.tenants import Tenant
from tests.waiting import wait_until

NUM_STRANGERS = 60


@pytest.fixture
def client(database: Database, servers: ServerAddresses) -> Iterator[TestClient]:
    storage = servers.storage
    settings = ApiSettings(
        database_url=database.api_url,
        s3_endpoint=storage.endpoint,
        s3_access_key=storage.access_key,
        s3_secret_key=storage.secret_key,
    )
    app = create_app(settings)
    with TestClient(app) as made:
        yield made
    resources_of(app).engine.dispose()


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered is remembered for as long as a test takes."""
    monkeypatch.setattr("api.auth.TTL_SECONDS", 3600.0)


def bearer(api_key: object) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"}


def test_while_strangers_keys_are_looked_up_a_known_key_is_answered(
    client: TestClient, database: Database, tenant: Tenant
) -> None:
    jobs = "/v1/fine_tuning/jobs"
    assert client.get(jobs, headers=bearer(tenant.api_key)).status_code == 200
    keys = [generate_api_key() for _ in range(NUM_STRANGERS)]
    keys += [generate_api_key(OPERATOR_PREFIX) for _ in range(NUM_STRANGERS)]
    with ThreadPoolExecutor(len(keys)) as pool, psycopg.connect(database.superuser_url) as holding:
        holding.execute("lock table api_keys, operator_keys in access exclusive mode")
        paths = [jobs] * NUM_STRANGERS + ["/admin/tenants"] * NUM_STRANGERS
        asked = [pool.submit(client.get, path, headers=bearer(key)) for path, key in zip(paths, keys, strict=True)]
        wait_until(lambda: num_waiting(database) == STRANGERS.total_tokens)
        for _ in range(20):
            assert client.get(jobs, headers=bearer(tenant.api_key)).status_code == 200
            assert client.get("/readyz").status_code == 200
        assert num_waiting(database) == STRANGERS.total_tokens
        holding.rollback()
        assert {each.result().status_code for each in asked} == {401}


def test_a_key_that_was_alive_waits_for_no_stranger(api: Engine, tenant: Tenant) -> None:
    authenticator = Authenticator(api)

    async def find() -> tuple[int, int]:
        used: list[float] = [ACQUAINTANCES.statistics().total_tokens, 0]
        async with anyio.create_task_group() as group:
            for place in range(int(STRANGERS.total_tokens)):
                await STRANGERS.acquire_on_behalf_of(place)
            group.start_soon(authenticator.find, f"Bearer {tenant.api_key}")
            await anyio.wait_all_tasks_blocked()
            used[1] = STRANGERS.statistics().tasks_waiting
            for place in range(int(STRANGERS.total_tokens)):
                STRANGERS.release_on_behalf_of(place)
        return int(used[0]), int(used[1])

    assert anyio.run(find)[1] == 1, "as a stranger it waits"
    (known,) = authenticator._live.values()
    authenticator._live[tenant.key_id] = type(known)(known.identity, known.secret_hash, until=0.0)
    assert anyio.run(find)[1] == 0


def test_a_refused_key_is_refused_again_without_a_look(api: Engine) -> None:
    authenticator, stranger = Authenticator(api), generate_api_key()
    statements: list[str] = []
    event.listen(api, "before_cursor_execute", lambda *told: statements.append(told[2]))
    for _ in range(3):
        with pytest.raises(UnauthenticatedError, match="unknown, expired or revoked"):
            authenticator.identify(f"Bearer {stranger}")
    num_asked = len(statements)
    with pytest.raises(UnauthenticatedError, match="unknown, expired or revoked"):
        authenticator.recall(f"Bearer {stranger}")
    assert len(statements) == num_asked == 1


def test_many_probes_ask_the_database_once(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.telemetry.readiness._TTL_SECONDS", 3600.0)
    statements: list[Any] = []
    app: Any = client.app
    event.listen(resources_of(app).engine, "before_cursor_execute", lambda *told: statements.append(told[2]))
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: client.get("/readyz"), range(100)))
    assert {each.status_code for each in answers} == {200}
    # The thread that keeps the database's time asks for itself.
    asked = [each for each in statements if not each.startswith("SELECT clock_timestamp()")]
    assert asked == [
        "select pg_is_in_recovery(), current_setting('transaction_read_only')::boolean",
        "select version_num from alembic_version",
    ]


@pytest.fixture
def api(database: Database) -> Iterator[Engine]:
    engine = connect(database.api_url)
    yield engine
    engine.dispose()
