"""`espalier doctor` on servers of its own: all is well, and each check is seen to fail once."""

from __future__ import annotations

import datetime as dt
import json
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from sqlalchemy import Engine, text
from typer.testing import CliRunner

from cli import output
from cli.doctor import trial
from cli.doctor.database import check_clock
from cli.doctor.findings import FindingState
from cli.doctor.servers import check_storage
from cli.main import app
from core.db.migrate import login_url
from core.db.session import connect, service_transaction
from core.domain.bases import Registry
from core.domain.workers import WorkerFacts
from core.services.leadership import lead, resign
from core.services.workers import forget_worker, record_worker
from core.storage import S3ObjectStore
from core.version import read_version
from local.ports import free_ports
from local.servers import LocalServers, ServerAddresses
from local.stack import prepare_database
from tests.integration.conftest import BASE_MODEL, LOGINS, add_tenant, running_api
from tests.integration.test_attempts import queue_job
from tests.integration.test_base_commands import make_entry

POOLS = (f"{BASE_MODEL}@none", f"{BASE_MODEL}@nf4")
Examine = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerAddresses]:
    """Servers that no other test uses: what is broken here is broken for nobody else."""
    with LocalServers(tmp_path_factory.mktemp("own"), is_durable=False) as servers:
        entry = make_entry(Path("/nowhere"))
        prepare_database(servers.addresses.postgres_url, Registry(base_models=(entry,)), logins=LOGINS)
        S3ObjectStore(servers.addresses.storage).ensure_bucket()
        yield servers.addresses


@pytest.fixture(scope="module")
def owner(own: ServerAddresses) -> Iterator[Engine]:
    engine = connect(own.postgres_url)
    yield engine
    engine.dispose()


@pytest.fixture(autouse=True)
def _one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_COMMIT", "0123456789ab")


@pytest.fixture
def env(own: ServerAddresses) -> dict[str, str]:
    return {
        "ESPALIER_OWNER_DATABASE_URL": own.postgres_url,
        "ESPALIER_REDIS_URL": own.redis_url,
        "ESPALIER_S3_ENDPOINT": own.storage.endpoint,
        "ESPALIER_S3_ACCESS_KEY": own.storage.access_key,
        "ESPALIER_S3_SECRET_KEY": own.storage.secret_key,
        "ESPALIER_S3_BUCKET": own.storage.bucket,
    }


@pytest.fixture
def examine(env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Run the doctor, and return what it found by check. Without the word of a GPU that this machine may have."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def run(*words: str, **changes: str | None) -> dict[str, dict[str, Any]]:
        argv = ["doctor", "--data-dir", str(tmp_path), "--json", *words]
        done = CliRunner().invoke(app, argv, env={**env, **changes}, catch_exceptions=False)
        found = {each["check"]: each for each in map(json.loads, done.stdout.splitlines())}
        assert done.exit_code == int(any(each["state"] == "failed" for each in found.values()))
        assert all(each["remedy"] for each in found.values() if each["state"] in ("failed", "warning"))
        return found

    return run


@pytest.fixture
def serving(owner: Engine) -> Iterator[None]:
    """A schedule that leads, a worker of this version that serves every pool, and a base that has been loaded."""
    with service_transaction(owner) as session:
        lead(session, "schedule-1", lease_seconds=600)
        facts = WorkerFacts("gpu-1", POOLS, "idle", version=str(read_version()))
        record_worker(session, facts, alive_seconds=600, is_start=True)
        session.execute(text("update base_models set state = 'usable', state_reason = null"))
    yield
    with service_transaction(owner) as session:
        resign(session, "schedule-1")
        forget_worker(session, "gpu-1")


def run(owner: Engine, *statements: str) -> None:
    with service_transaction(owner) as session:
        for statement in statements:
            session.execute(text(statement))


@pytest.mark.usefixtures("serving")
def test_a_deployment_that_is_well_is_found_well(examine: Examine, own: ServerAddresses) -> None:
    (port,) = free_ports(1)
    api_url = login_url(own.postgres_url, LOGINS[0])
    with running_api(api_url, own.storage, port=port):
        found = examine("--api-url", f"http://127.0.0.1:{port}")
    assert {check: each["state"] for check, each in found.items()} == dict.fromkeys(
        [
            "version",
            "redis",
            "storage put",
            "storage get",
            "storage link",
            "storage delete",
            "api",
            "database",
            "schema",
            *("roles", "grants", "operator", "clock", "schedule", "workers", "bases"),
        ],
        "ok",
    ) | {"gpu": "skipped"}
    left = list(S3ObjectStore(own.storage).list_keys("tenants/"))
    assert not [object_key for object_key in left if "/doctor/" in object_key]


@pytest.mark.usefixtures("serving")
def test_the_apis_own_role_can_look_at_all_of_it(examine: Examine, own: ServerAddresses) -> None:
    url = login_url(own.postgres_url, LOGINS[0])
    found = examine(ESPALIER_OWNER_DATABASE_URL=None, ESPALIER_DATABASE_URL=url)
    assert {each["state"] for check, each in found.items() if check not in ("gpu", "api")} == {"ok"}
    found = examine(ESPALIER_OWNER_DATABASE_URL=None, ESPALIER_DATABASE_URL=login_url(own.postgres_url, LOGINS[1]))
    assert {check for check, each in found.items() if each["state"] == "failed"} == set()
    assert found["operator"]["state"] == found["workers"]["state"] == "skipped"


def test_settings_that_are_missing_are_named_and_hide_no_other_check(examine: Examine) -> None:
    found = examine(ESPALIER_S3_ACCESS_KEY=None, ESPALIER_REDIS_URL=None)
    assert "ESPALIER_S3_ACCESS_KEY" in found["storage"]["says"]
    assert "ESPALIER_REDIS_URL" in found["redis"]["says"]
    assert found["schema"]["state"] == "ok"


def test_settings_that_are_not_there_are_skipped_with_what_to_set(examine: Examine, env: dict[str, str]) -> None:
    found = examine(**dict.fromkeys(env))
    absent = {check: found[check] for check in ("database", "redis", "storage")}
    assert {each["state"] for each in absent.values()} == {"skipped"}
    told = ("ESPALIER_OWNER_DATABASE_URL", "ESPALIER_REDIS_URL", "ESPALIER_S3_ENDPOINT")
    assert all(name in each["remedy"] for name, each in zip(told, absent.values(), strict=True))
    assert examine("--job", **dict.fromkeys(env))["job"]["state"] == "failed"


def test_settings_of_which_a_part_is_there_have_failed(examine: Examine) -> None:
    assert examine(ESPALIER_S3_ACCESS_KEY=None)["storage"]["state"] == "failed"


def test_settings_may_be_files_as_containers_have_them(examine: Examine, env: dict[str, str], tmp_path: Path) -> None:
    found = examine(**as_files(env, tmp_path))
    looked_at = ("database", "schema", "operator", "redis", "storage put", "storage link", "storage delete")
    assert {found[check]["state"] for check in looked_at} == {"ok"}
    assert found == examine() | {"database": found["database"]}  # which counts connections


@pytest.mark.parametrize(
    ("variable", "check"),
    [
        ("ESPALIER_OWNER_DATABASE_URL", "database"),
        ("ESPALIER_REDIS_URL", "redis"),
        ("ESPALIER_S3_ACCESS_KEY", "storage"),
        ("ESPALIER_S3_SECRET_KEY", "storage"),
    ],
)
@pytest.mark.parametrize("content", [None, b"\xff", b""], ids=["not there", "not text", "empty"])
def test_a_file_of_a_setting_that_cannot_be_read_has_failed_and_hides_no_other_check(
    examine: Examine, env: dict[str, str], tmp_path: Path, variable: str, check: str, content: bytes | None
) -> None:
    changes = as_files(env, tmp_path)
    path = tmp_path / f"{variable}_FILE"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    # The URL of another role does not stand in for an owner's that is wrong.
    found = examine(**changes, ESPALIER_DATABASE_URL=env["ESPALIER_OWNER_DATABASE_URL"])
    assert (found[check]["state"], f"{variable}_FILE names {path}" in found[check]["says"]) == ("failed", True), found
    others = {"database", "redis", "storage put"} - {check, f"{check} put"}
    assert {found[each]["state"] for each in others} == {"ok"}


def as_files(env: dict[str, str], directory: Path) -> dict[str, str | None]:
    """Return the changes by which the secrets among settings come from files."""
    changes: dict[str, str | None] = {}
    for name in [name for name in env if name.endswith(("_URL", "_KEY"))]:
        path = directory / f"{name}_FILE"
        path.write_text(f"{env[name]}\n", encoding="utf-8")
        changes |= {name: None, path.name: str(path)}
    return changes


@pytest.mark.parametrize("variable", ["ESPALIER_OWNER_DATABASE_URL", "ESPALIER_DATABASE_URL"])
@pytest.mark.parametrize("url", ["postgresql://u:hush@host:port/name", "no url at all"])
def test_what_is_no_url_is_found_and_not_shown(examine: Examine, variable: str, url: str) -> None:
    found = examine(**{"ESPALIER_OWNER_DATABASE_URL": None, variable: url})["database"]
    assert found["state"] == "failed"
    assert f"{variable} (Value error, This is no URL of a database." in found["says"]
    assert "hush" not in str(found)


@pytest.mark.parametrize("url", ["redis://:hush/ret@host:6379/0", "redis://user:hush#x@host", "redis://host/hush"])
def test_what_is_no_url_of_a_redis_is_found_and_not_shown(examine: Examine, url: str) -> None:
    found = examine(ESPALIER_REDIS_URL=url)["redis"]
    assert found["state"] == "failed"
    assert "ESPALIER_REDIS_URL (Value error, This is no URL of a Redis." in found["says"]
    assert "hush" not in str(found)


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


def test_nobody_who_leads_and_nobody_who_works_are_found(examine: Examine, owner: Engine) -> None:
    run(owner, "delete from leaders", "truncate jobs, queues cascade")
    found = examine()
    assert found["schedule"] | {"state": "failed", "says": "No schedule has ever led."} == found["schedule"]
    assert found["workers"]["state"] == "warning"
    queue_job(owner, add_tenant(owner))
    found = examine()
    assert (found["workers"]["state"], found["workers"]["says"]) == ("failed", "No worker is alive; 1 jobs are queued.")
    run(owner, "truncate jobs, queues cascade")


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (WorkerFacts("gpu-1", POOLS, "idle", refusals={POOLS[1]: "Too little memory."}), "Too little memory."),
        (WorkerFacts("gpu-1", POOLS[:1], "idle"), f"none of them serves {POOLS[1]}"),
        (WorkerFacts("gpu-1", POOLS, "idle", version="0.0.1"), "gpu-1 runs another version"),
    ],
)
def test_a_worker_that_does_not_do_all_it_should_is_found(
    examine: Examine, owner: Engine, facts: WorkerFacts, told: str
) -> None:
    with service_transaction(owner) as session:
        record_worker(session, facts, alive_seconds=600, is_start=False)
    found = examine()["workers"]
    assert (found["state"], told in found["says"]) == ("warning", True), found


@pytest.mark.parametrize(
    ("script", "state", "told"),
    [
        ("echo 'NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4'", "failed", "driver 570.86.15"),
        ("echo 'NVIDIA H100 80GB HBM3, 580.95.05, 81559, 4'", None, "4 of 81559 MiB used"),
        ("exit 9", "failed", "nvidia-smi does not answer"),
        ("true", "failed", "no GPU"),
    ],
)
def test_a_device_that_cannot_be_used_is_found(
    examine: Examine, tmp_path: Path, script: str, state: str | None, told: str
) -> None:
    """With a program that says what NVIDIA's says on such a host: there is none here."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    found = examine()["gpu"]
    assert found["state"] in ((state,) if state else ("ok", "failed"))  # as torch's build here is
    assert told in found["says"]


def test_a_job_needs_an_api(examine: Examine) -> None:
    assert examine("--job")["job"]["state"] == "failed"


def test_a_job_that_nobody_takes_is_given_up_and_leaves_nothing_behind(examine: Examine, own: ServerAddresses) -> None:
    (port,) = free_ports(1)
    with running_api(login_url(own.postgres_url, LOGINS[0]), own.storage, port=port):
        found = examine("--job", "--patience", "1", "--api-url", f"http://127.0.0.1:{port}")["job"]
    assert (found["state"], "still queued and was cancelled" in found["says"]) == ("failed", True), found
    with psycopg.connect(own.postgres_url) as connection:
        alive = "select count(*) from api_keys k join tenants t on t.id = k.tenant_id where t.slug = 'espalier-doctor' and revoked_at is null"
        assert connection.execute(alive).fetchone() == (0,)
        unfinished = "select count(*) from jobs where status not in ('cancelled')"
        assert connection.execute(unfinished).fetchone() == (0,)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_who_waits_for_a_job_is_told_which_it_is_and_each_new_reason_once(
    own: ServerAddresses,
    owner: Engine,
    env: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantization: str | None,
) -> None:
    """On standard error. A pool that a worker holds is taken; where none is held the reason is heard to change."""
    monkeypatch.setattr(trial, "_EXPLAIN_SECONDS", 0.1)
    told: list[str] = []

    def tell(sentence: str) -> None:
        told.append(sentence)
        output.tell(sentence)
        if len(told) == 2 and quantization is None:  # the first reason
            start_worker(state="idle")

    def start_worker(**facts: Any) -> None:
        with service_transaction(owner) as session:
            record_worker(session, WorkerFacts("gpu-1", POOLS, **facts), alive_seconds=600, is_start=True)

    monkeypatch.setattr(trial, "tell", tell)
    if quantization:
        start_worker(state="serving", pool=f"{BASE_MODEL}@{quantization}", slots=8)
    (port,) = free_ports(1)
    argv = ["doctor", "--data-dir", str(tmp_path), "--json", "--job", "--patience", "4"]
    with running_api(login_url(own.postgres_url, LOGINS[0]), own.storage, port=port):
        argv += ["--api-url", f"http://127.0.0.1:{port}"]
        done = CliRunner().invoke(app, argv, env=env, catch_exceptions=False)
    with service_transaction(owner) as session:
        forget_worker(session, "gpu-1")
    lines = done.stderr.splitlines()
    pool = f"{BASE_MODEL}@{quantization or 'none'}"
    assert re.fullmatch(rf"Job ftjob-[0-9a-f]{{32}} was submitted: base {BASE_MODEL}, pool {pool}\.", lines[0])
    assert "orker" in lines[1] or quantization
    assert len(lines) == len(set(lines)) == (2 if quantization else 3), lines
    assert all(json.loads(line)["check"] for line in done.stdout.splitlines())
