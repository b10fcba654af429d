"""Each check of a server and of its content is made to fail once."""

from __future__ import annotations

import datetime as dt
import json
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import redis
from sqlalchemy import Engine, text

from cli.doctor.database import check_clock
from cli.doctor.findings import FindingState
from cli.doctor.servers import check_storage
from core.db.session import service_transaction
from local.servers import ServerAddresses
from tests.integration.doctor.examining import Examine, run


def test_servers_that_are_away_are_told_one_by_one_and_no_password_with_them(examine: Examine) -> None:
    found = examine(
        "--api-url",
        "http://127.0.0.1:9",
        ESPALIER_OWNER_DATABASE_URL="postgresql://postgres:hush-hush@127.0.0.1:9/postgres",
        ESPALIER_REDIS_URL="redis://:hush-hush@127.0.0.1:9",
        ESPALIER_S3_ENDPOINT="127.0.0.1:9",
    )
    assert {check for check, each in found.items() if each["state"] == "failed"} == {
        "database",
        "redis",
        "storage put",
        "api",
    }
    assert "hush" not in json.dumps(found)


@pytest.mark.parametrize(
    ("found", "told"), [("0019", "It is at 0019; this code expects"), ("9999", "which this code does not know")]
)
def test_a_schema_of_another_version_is_found(examine: Examine, owner: Engine, found: str, told: str) -> None:
    with service_transaction(owner) as session:
        newest = session.scalars(text("select version_num from alembic_version")).one()
    run(owner, f"update alembic_version set version_num = '{found}'")
    try:
        schema = examine()["schema"]
    finally:
        run(owner, f"update alembic_version set version_num = '{newest}'")
    assert (schema["state"], told in schema["says"]) == ("failed", True)


@pytest.mark.parametrize(
    ("check", "broken", "mended", "told"),
    [
        (
            "roles",
            "alter role espalier_worker bypassrls",
            "alter role espalier_worker nobypassrls",
            "espalier_worker may pass",
        ),
        ("roles", "alter role espalier_api nologin", "alter role espalier_api login", "espalier_api cannot log in"),
        (
            "roles",
            "revoke espalier_operator from espalier_api",
            "grant espalier_operator to espalier_api",
            "cannot become an operator",
        ),
        (
            "roles",
            "alter role espalier_scaler rename to mislaid",
            "alter role mislaid rename to espalier_scaler",
            "espalier_scaler",
        ),
        ("grants", "alter table jobs no force row level security", "alter table jobs force row level security", "jobs"),
        (
            "grants",
            "revoke select on pool_demand from espalier_scaler",
            "grant select on pool_demand to espalier_scaler",
            "espalier_scaler may not select pool_demand",
        ),
        ("bases", "update base_models set is_enabled = false", "update base_models set is_enabled = true", "on offer"),
        (
            "bases",
            "update base_models set state = 'unusable', state_reason = 'It is not there.'",
            "update base_models set state = 'usable', state_reason = null",
            "It is not there.",
        ),
    ],
)
def test_what_is_broken_in_the_database_is_found_and_then_mended(
    examine: Examine, owner: Engine, check: str, broken: str, mended: str, told: str
) -> None:
    run(owner, broken)
    try:
        found = examine()[check]
    finally:
        run(owner, mended)
    assert (found["state"], told in found["says"]) == ("failed", True), found
    assert examine()[check]["state"] in ("ok", "warning")


def test_an_owner_that_may_not_become_an_operator_is_told_what_to_grant(
    examine: Examine, own: ServerAddresses, owner: Engine
) -> None:
    """As on a managed PostgreSQL: who migrates is no superuser."""
    run(owner, "create role manager login password 'manager-password'")
    place = own.postgres_url.rpartition("@")[2]
    roles = ("espalier_operator", "espalier_auditor", "espalier_backup")
    for role in roles:
        found = examine(ESPALIER_OWNER_DATABASE_URL=f"postgresql://manager:manager-password@{place}")["operator"]
        assert found["state"] == "failed"
        assert found["remedy"].startswith(f"Run `grant {role} to manager with set true`")
        run(owner, f"grant {role} to manager with set true")
    found = examine(ESPALIER_OWNER_DATABASE_URL=f"postgresql://manager:manager-password@{place}")["operator"]
    assert found["state"] == "ok"
    for role in roles:
        run(owner, f"revoke {role} from manager")
        found = examine(ESPALIER_OWNER_DATABASE_URL=f"postgresql://manager:manager-password@{place}")["operator"]
        assert found["remedy"].startswith(f"Run `grant {role} to manager with set true`")
        run(owner, f"grant {role} to manager with set true")
    run(owner, "drop role manager")


@pytest.mark.parametrize(
    ("seconds", "state"),
    [(0, FindingState.OK), (-4, FindingState.WARNING), (4, FindingState.WARNING), (60, FindingState.FAILED)],
)
def test_a_clock_that_is_off_is_found(owner: Engine, seconds: int, state: FindingState) -> None:
    off = dt.timedelta(seconds=seconds)
    with service_transaction(owner) as session:
        assert check_clock(session, now=lambda: dt.datetime.now(dt.UTC) + off).state == state


def test_a_redis_that_evicts_or_forgets_is_found(examine: Examine, own: ServerAddresses) -> None:
    with redis.Redis.from_url(own.redis_url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        evicting = examine()["redis"]
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendonly", "no")
        forgetting = examine()["redis"]
        client.config_set("appendonly", "yes")
    assert (evicting["state"], "allkeys-lru" in evicting["says"]) == ("failed", True)
    assert (forgetting["state"], "keeps nothing" in forgetting["says"]) == ("warning", True)


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({"ESPALIER_S3_SECRET_KEY": "wrong"}, {"storage put"}),
        ({"ESPALIER_S3_BUCKET": "none-such"}, {"storage put"}),
        ({"ESPALIER_S3_PUBLIC_ENDPOINT": "127.0.0.1:9"}, {"storage link"}),
    ],
)
def test_a_bucket_that_cannot_be_used_is_found(examine: Examine, change: dict[str, str], failing: set[str]) -> None:
    found = examine(**change)
    assert failing <= {check for check, each in found.items() if each["state"] == "failed"} <= failing | {"schedule"}


def test_a_link_that_only_another_host_can_fetch_is_not_judged(
    own: ServerAddresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, where links name the port of the host that clients are on."""
    public = replace(own.storage, public_endpoint="localhost:9")
    assert {each.check: each.state for each in check_storage(public)}["storage link"] == FindingState.FAILED
    port = own.storage.endpoint.rpartition(":")[2]
    monkeypatch.setattr(socket, "getaddrinfo", as_if_named(socket.getaddrinfo, "store.example", "127.0.0.1"))
    named = replace(public, endpoint=f"store.example:{port}")
    assert {each.check: each.state for each in check_storage(named)} == {
        "storage put": FindingState.OK,
        "storage get": FindingState.OK,
        "storage link": FindingState.SKIPPED,
        "storage delete": FindingState.OK,
    }


def as_if_named(find: Callable[..., Any], name: str, address: str) -> Callable[..., Any]:
    """Return a resolver that knows one name more."""
    return lambda host, *rest, **options: find(address if host == name else host, *rest, **options)
