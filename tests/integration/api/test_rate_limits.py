"""Rate limits: shown on every answer, enforced, and without effect while Redis is away."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, text

from api.main import create_app
from api.rate_limits import WINDOW_SECONDS, RateLimiter
from api.resources import resources_of
from core.db.session import service_transaction
from core.settings import ApiSettings
from core.storage import host_time
from local.ports import free_ports
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.tenants import Tenant
from tests.faults import FaultProxy, Hang, port_of, with_port
from tests.waiting import PATIENCE_SECONDS


def settings_of(database: Database, servers: ServerAddresses, redis_url: str | None) -> ApiSettings:
    storage = servers.storage
    return ApiSettings(
        database_url=database.api_url,
        redis_url=redis_url,
        s3_endpoint=storage.endpoint,
        s3_access_key=storage.access_key,
        s3_secret_key=storage.secret_key,
        requests_per_minute=5,
    )


@pytest.fixture
def client(database: Database, servers: ServerAddresses) -> Iterator[TestClient]:
    app = create_app(settings_of(database, servers, servers.redis_url))
    with TestClient(app) as made:
        yield made
    resources_of(app).engine.dispose()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine's Redis may take longer than the tenth of a second that a request waits for it."""
    monkeypatch.setattr("api.rate_limits._TIMEOUT_SECONDS", PATIENCE_SECONDS)


@pytest.fixture(autouse=True)
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the windows stands in the middle of one, so that no test straddles two on a busy machine."""
    middle = time.time() // WINDOW_SECONDS * WINDOW_SECONDS + WINDOW_SECONDS / 2
    monkeypatch.setattr("api.rate_limits.time", SimpleNamespace(time=lambda: middle, monotonic=time.monotonic))


def auth(tenant: Tenant) -> dict[str, str]:
    return {"authorization": f"Bearer {tenant.api_key}"}


def test_the_sixth_request_of_five_a_minute_is_refused_and_told_when_to_come_back(
    client: TestClient, tenant: Tenant, other_tenant: Tenant
) -> None:
    answers = [client.get("/v1/models", headers=auth(tenant)) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429]
    assert [re.findall(r'^"requests";r=(\d);t=\d+$', answer.headers["ratelimit"]) for answer in answers] == [
        [left] for left in "432100"
    ]
    assert {answer.headers["ratelimit-policy"] for answer in answers} == {'"requests";q=5;w=60'}
    refused = answers[-1]
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= WINDOW_SECONDS
    assert "retry-after" not in answers[0].headers
    assert client.get("/v1/models", headers=auth(other_tenant)).status_code == 200


def test_an_error_counts_and_is_told_the_standing_too(client: TestClient, tenant: Tenant) -> None:
    answer = client.get(f"/v1/files/file-{'0' * 32}", headers=auth(tenant))
    assert (answer.status_code, answer.headers["ratelimit"][:14]) == (404, '"requests";r=4')


def test_an_operator_sets_one_tenants_own_limit(client: TestClient, owner: Engine, tenant: Tenant) -> None:
    with service_transaction(owner) as session:
        session.execute(text("update tenants set requests_per_minute = 2 where id = :id"), {"id": tenant.id})
    assert [client.get("/v1/models", headers=auth(tenant)).status_code for _ in range(3)] == [200, 200, 429]


def test_a_hundred_requests_at_once_pass_exactly_as_many_as_the_limit(servers: ServerAddresses) -> None:
    limiters = [RateLimiter(servers.redis_url, now=host_time) for _ in range(2)]  # as two processes
    tenant_id = uuid.uuid4()

    def count(number: int) -> bool:
        standing = limiters[number % 2].count(tenant_id, limit=30)
        assert standing is not None
        return not standing.is_exceeded

    with ThreadPoolExecutor(20) as threads:
        assert sum(threads.map(count, range(100))) == 30


def test_far_from_its_limit_a_tenant_is_counted_in_advance_and_passes_it_never(servers: ServerAddresses) -> None:
    limiters = [RateLimiter(servers.redis_url, now=host_time) for _ in range(2)]
    tenant_id, limit = uuid.uuid4(), 10_000
    num_asked = num_passed = 0
    for number in range(limit + 100):
        limiter = limiters[number % 3 == 0]
        standing = limiter.draw(tenant_id, limit=limit)
        if standing is None:
            num_asked += 1
            standing = limiter.count(tenant_id, limit=limit)
        assert standing is not None
        num_passed += not standing.is_exceeded
    assert limit * 0.998 <= num_passed <= limit
    assert num_asked < limit / 2


def test_without_redis_requests_pass_and_none_waits(
    database: Database, servers: ServerAddresses, tenant: Tenant
) -> None:
    (port,) = free_ports(1)
    app = create_app(settings_of(database, servers, f"redis://127.0.0.1:{port}/0"))
    with TestClient(app) as client:
        answers = [client.get("/v1/models", headers=auth(tenant)) for _ in range(8)]
    resources_of(app).engine.dispose()
    assert {answer.status_code for answer in answers} == {200}
    assert not [answer for answer in answers if "ratelimit" in answer.headers]


def test_a_redis_that_does_not_answer_costs_one_request_a_tenth_of_a_second_and_the_others_nothing(
    servers: ServerAddresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(port_of(servers.redis_url)) as proxy:
        url = with_port(servers.redis_url, proxy.port)
        assert RateLimiter(url, now=host_time).count(uuid.uuid4(), limit=5) is not None
        monkeypatch.setattr("api.rate_limits._TIMEOUT_SECONDS", 0.1)
        monkeypatch.setattr("api.rate_limits._REST_SECONDS", 3600.0)
        limiter = RateLimiter(url, now=host_time)
        with proxy.during(Hang()):
            assert [limiter.count(uuid.uuid4(), limit=5) for _ in range(20)] == [None] * 20
            assert proxy.num_hits <= 1, "one has asked Redis within an interval of rest, and waited"
