"""The database is away in every form: read-only, silent, too slow, vanished. The service recovers by itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Engine, text

from core.db.clock import DatabaseClock
from core.db.connections import Subscription
from core.db.notifications import Listener
from core.db.session import DATABASE_ERRORS, connect, service_transaction, state_of, took_too_long
from core.domain.duties import Duty
from core.domain.workers import WorkerFacts
from core.services.set_asides import ROW_ERRORS, list_set_asides, setting_aside
from local.ports import free_ports
from local.servers import ServerAddresses
from tests.black_hole import find_namespace
from tests.databases import Database, run
from tests.factories.jobs import claim, queue_job, status_of
from tests.factories.tenants import Tenant
from tests.faults import FaultProxy, Hang, port_of, with_port
from tests.processes import leader_pid, running_api, schedule_process
from tests.sessions import any_role_transaction
from tests.waiting import PATIENCE_SECONDS, wait_until
from worker.supervisor.presence import Presence

ROOT = Path(__file__).resolve().parents[2]
SHORT_SECONDS = 0.05
QUICK: dict[str, Any] = {
    "wake_interval_seconds": "0.2",
    "reap_interval_seconds": "0.2",
    "clean_interval_seconds": "0.2",
}


@pytest.fixture
def worker(worker: Engine, owner: Engine) -> Engine:
    run(owner, "truncate jobs, queues, leaders cascade")
    return worker


@contextmanager
def administered(servers: ServerAddresses, database: Database, change: str, *, back: str) -> Iterator[None]:
    """Change the database's settings, within the block, for everybody who connects; who is connected must do so."""
    name = sql.Identifier(database.owner_url.rpartition("/")[2])
    others = (
        "select pg_terminate_backend(pid, 60000) from pg_stat_activity where datname = %s and usename like 'espalier%%'"
    )
    with psycopg.connect(servers.postgres_url, autocommit=True) as admin:
        admin.execute(sql.SQL(change).format(name))
        admin.execute(others, (database.owner_url.rpartition("/")[2],))
        try:
            yield
        finally:
            admin.execute(sql.SQL(back).format(name))


ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
READ_ONLY = {
    "change": "alter database {} set default_transaction_read_only = on",
    "back": "alter database {} reset default_transaction_read_only",
}


def told(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def has_told(log: Path, event: str, **facts: str) -> bool:
    return any({"event": event, **facts}.items() <= line.items() for line in told(log))


def is_present(owner: Engine, name: str) -> bool:
    query = text("select alive_until > clock_timestamp() from workers where name = :name")
    with owner.connect() as connection:
        return bool(connection.execute(query, {"name": name}).scalar())


def forget(owner: Engine, name: str) -> None:
    with owner.begin() as connection:
        connection.execute(text("set transaction read write"))
        connection.execute(text("delete from workers where name = :name"), {"name": name})


@pytest.mark.fault(56)
def test_a_schedule_and_a_presence_outlive_a_read_only_database(
    worker: Engine, owner: Engine, database: Database, servers: ServerAddresses, tenant: Tenant, tmp_path: Path
) -> None:
    queue_job(owner, tenant)
    other = connect(database.worker_url)
    log, name = tmp_path / "log", f"w-{uuid.uuid4()}"
    clock, facts = DatabaseClock(worker), WorkerFacts(name, pools=(), state="idle")
    presence = Presence(worker, clock, interval_seconds=0.1, describe=lambda: facts)
    presence.start()
    with log.open("wb") as stream, schedule_process(database, servers, log=stream, **QUICK) as process:
        wait_until(lambda: leader_pid(owner) == process.pid, what="the schedule's lead")
        wait_until(lambda: is_present(owner, name), what="the worker's presence")
        with administered(servers, database, **READ_ONLY):
            wait_until(lambda: has_told(log, "database.unavailable", error="InternalError"), what="a refused write")
            forget(owner, name)
        lost = claim(other, lease_seconds=-1)
        assert lost is not None
        wait_until(lambda: status_of(owner, lost) == "queued", what="expiry")
        wait_until(lambda: is_present(owner, name), what="the worker's presence again")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
    presence.close()
    other.dispose()


@pytest.mark.fault(56)
def test_an_api_whose_database_was_read_only_takes_writes_again_and_says_why_it_did_not(
    database: Database, servers: ServerAddresses, tenant: Tenant
) -> None:
    port, management = free_ports(2)
    keys = {"authorization": f"Bearer {tenant.api_key}"}
    url = f"http://127.0.0.1:{port}"

    def write() -> httpx.Response:
        file = {"file": ("rows.jsonl", ROW)}
        form: dict[str, Any] = {"files": file, "data": {"purpose": "fine-tune"}}
        return httpx.post(f"{url}/v1/files", **form, headers=keys, trust_env=False, timeout=PATIENCE_SECONDS)

    env = {"ESPALIER_MANAGEMENT_PORT": str(management)}
    with running_api(database.api_url, servers.storage, port=port, env=env) as process:
        assert write().is_success
        with administered(servers, database, **READ_ONLY):
            wait_until(lambda: ask(port, "/readyz").status_code == httpx.codes.SERVICE_UNAVAILABLE, what="no readiness")
            wait_until(lambda: code_of(ask(port, "/readyz")) == "database_read_only", what="the reason")
            assert ask(port, "/readyz").headers["retry-after"]
            assert ask(management, "/readyz").text == "The database is read-only: it takes no writes.\n"
            assert (ask(port, "/livez").status_code, ask(management, "/livez").status_code) == (200, 200)
            answer = write()
            assert (answer.status_code, code_of(answer)) == (503, "unavailable")
        wait_until(lambda: ask(port, "/readyz").is_success, what="readiness")
        wait_until(lambda: write().is_success, what="a write")
        assert process.poll() is None


def ask(port: int, path: str) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=PATIENCE_SECONDS)


def code_of(answer: httpx.Response) -> str | None:
    return answer.json().get("error", {}).get("code")  # type: ignore[no-any-return]


def test_a_pool_whose_connections_lead_to_a_read_only_server_makes_new_ones(
    database: Database, servers: ServerAddresses
) -> None:
    engine = connect(database.owner_url, pool_size=2)
    create = text(f"create table made_{uuid.uuid4().hex} ()")
    with administered(servers, database, **READ_ONLY):
        with engine.connect(), engine.connect():  # both are read-only for as long as they live
            pass
        with pytest.raises(DATABASE_ERRORS) as caught, service_transaction(engine) as session:
            session.execute(create)
    assert state_of(caught.value) == "25006"
    with service_transaction(engine) as session:
        session.execute(create)
    engine.dispose()


def test_a_transaction_that_idled_too_long_is_one_of_the_database_errors(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.db.session._IDLE_TRANSACTION_MILLISECONDS", 100)
    engine = connect(database.worker_url, pool_size=1)
    with pytest.raises(DATABASE_ERRORS) as caught, service_transaction(engine) as session:
        session.execute(text("select 1"))
        pid = session.connection().connection.driver_connection.info.backend_pid  # type: ignore[union-attr]
        wait_until(lambda: not is_running(database, pid), what="the end of the connection")
        session.execute(text("select 1"))
    assert state_of(caught.value) in ("25P03", "")
    engine.dispose()


def is_running(database: Database, pid: int) -> bool:
    with psycopg.connect(database.owner_url) as connection:
        return connection.execute("select from pg_stat_activity where pid = %s", (pid,)).fetchone() is not None


SOCKET_OPTIONS = {"TCP_USER_TIMEOUT": 12_000, "TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}


def options_of(connection: Any) -> dict[str, int]:
    found = socket.socket(fileno=os.dup(connection.fileno()))
    with found:
        assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        return {name: found.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in SOCKET_OPTIONS}


@pytest.mark.fault(57)
def test_the_kernel_gives_up_on_every_connection_within_seconds(database: Database) -> None:
    engine = connect(database.worker_url)
    with engine.connect() as connection, Subscription(database.worker_url, "news") as subscription:
        assert options_of(connection.connection.driver_connection) == SOCKET_OPTIONS
        assert options_of(subscription._connection) == SOCKET_OPTIONS
    engine.dispose()


def test_a_listener_behind_a_proxy_that_answers_for_a_silent_server_listens_again(
    database: Database, owner: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.db.connections._SILENCE_SECONDS", 0.2)
    monkeypatch.setattr("core.db.connections._ANSWER_SECONDS", 0.2)
    heard: list[str] = []
    num_connections: list[None] = []
    with FaultProxy(port_of(database.worker_url)) as proxy:
        listener = Listener(
            with_port(database.worker_url, proxy.port),
            "news",
            on_payload=heard.append,
            on_connect=lambda: num_connections.append(None),
        )
        thread = threading.Thread(target=listener.run, daemon=True)
        thread.start()
        wait_until(lambda: len(num_connections) == 1, what="a connection")
        with proxy.during(Hang()):
            wait_until(lambda: proxy.num_hits > 1, what="another try after the question that was not answered")
        wait_until(lambda: len(num_connections) > 1, what="another connection")
        with owner.begin() as connection:
            connection.execute(text("select pg_notify('news', 'heard')"))
        wait_until(lambda: heard == ["heard"], what="the notification")
        listener.request_stop()
        thread.join()


TIMED = {
    "change": "alter database {} set statement_timeout = 1000",
    "back": "alter database {} reset statement_timeout",
}


def test_a_statement_that_took_too_long_says_so_and_is_not_tried_again(
    database: Database, servers: ServerAddresses, tenant: Tenant
) -> None:
    (port,) = free_ports(1)
    keys = {"authorization": f"Bearer {tenant.api_key}"}
    with running_api(database.api_url, servers.storage, port=port), administered(servers, database, **TIMED):
        wait_until(lambda: ask(port, "/readyz").is_success, what="readiness")
        url = f"http://127.0.0.1:{port}/v1/fine_tuning/jobs"
        wait_until(lambda: httpx.get(url, headers=keys, trust_env=False, timeout=PATIENCE_SECONDS).is_success)
        with psycopg.connect(database.owner_url) as holding:
            holding.execute("set statement_timeout = 0")
            holding.execute("lock table jobs in access exclusive mode")
            answer = httpx.get(url, headers=keys, trust_env=False, timeout=PATIENCE_SECONDS)
        assert (answer.status_code, code_of(answer)) == (504, "statement_timeout")
        assert "retry-after" not in answer.headers
        assert answer.headers["x-should-retry"] == "false"


@pytest.mark.usefixtures("worker")
def test_a_duty_that_took_too_long_is_named_and_the_others_are_done(
    owner: Engine, database: Database, servers: ServerAddresses, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with (
        administered(servers, database, **TIMED),
        log.open("wb") as stream,
        psycopg.connect(database.owner_url) as holding,
        schedule_process(database, servers, log=stream, **QUICK) as process,
    ):
        wait_until(lambda: leader_pid(owner) == process.pid, what="the schedule's lead")
        holding.execute("set statement_timeout = 0")
        holding.execute("lock table idempotency_keys in access exclusive mode")
        wait_until(lambda: has_told(log, "duty.timed_out", duty="clean"), what="the duty's name")
        assert not has_told(log, "database.unavailable")
        assert leader_pid(owner) == process.pid


def test_a_row_whose_statement_took_too_long_is_set_aside(owner: Engine, tenant: Tenant) -> None:
    row_id = uuid.uuid4()
    with (
        service_transaction(owner) as session,
        setting_aside(session, Duty.EXPIRE, row_id=row_id, tenant_id=tenant.id),
    ):
        session.execute(text("set local statement_timeout = 50"))
        session.execute(text("select pg_sleep(3600)"))
    with any_role_transaction(owner) as session:
        assert row_id in {each.row_id for each in list_set_asides(session)}


@pytest.mark.parametrize(("errcode", "is_rows"), [("25006", False), ("XX000", True), ("XX001", True), ("XX002", True)])
def test_damage_is_its_rows_fault_and_a_server_that_cannot_write_is_nobodys(
    owner: Engine, tenant: Tenant, errcode: str, *, is_rows: bool
) -> None:
    refuse = text(f"do $$ begin raise exception 'it is so' using errcode = '{errcode}'; end $$")
    with pytest.raises(DATABASE_ERRORS) as caught, service_transaction(owner) as session:
        session.execute(refuse)
    assert (state_of(caught.value), isinstance(caught.value, ROW_ERRORS)) == (errcode, is_rows)
    row_id = uuid.uuid4()
    with (
        nullcontext() if is_rows else pytest.raises(DATABASE_ERRORS),
        service_transaction(owner) as session,
        setting_aside(session, Duty.EXPIRE, row_id=row_id, tenant_id=tenant.id),
    ):
        session.execute(refuse)
    with any_role_transaction(owner) as session:
        reasons = {each.row_id: each.reason for each in list_set_asides(session)}
    assert reasons.get(row_id) == ("it is so" if is_rows else None)


def test_a_lock_that_was_not_free_in_time_may_be_tried_again(database: Database) -> None:
    engine = connect(database.owner_url, lock_timeout_seconds=SHORT_SECONDS)
    with psycopg.connect(database.owner_url) as holding:
        holding.execute("lock table jobs in access exclusive mode")
        with pytest.raises(DATABASE_ERRORS) as caught, service_transaction(engine) as session:
            session.execute(text("select from jobs"))
    assert (state_of(caught.value), took_too_long(caught.value)) == ("55P03", False)
    engine.dispose()


@pytest.mark.fault(58)
@pytest.mark.usefixtures("worker", "tenant")
def test_a_schedule_one_of_whose_threads_fails_ends_with_status_1_while_another_waits_for_the_store(
    owner: Engine, database: Database, servers: ServerAddresses, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with FaultProxy(int(servers.storage.endpoint.rpartition(":")[2])) as proxy:
        proxy.inject(Hang())
        hanging = replace(servers, storage=replace(servers.storage, endpoint=f"127.0.0.1:{proxy.port}"))
        with log.open("wb") as stream, schedule_process(database, hanging, log=stream, **QUICK) as process:
            wait_until(lambda: proxy.num_hits > 0, what="a question to the store")
            with owner.begin() as connection:
                connection.execute(text("alter table idempotency_keys rename to gone"))
            try:
                assert process.wait(PATIENCE_SECONDS) == 1
            finally:
                with owner.begin() as connection:
                    connection.execute(text("alter table gone rename to idempotency_keys"))
    (line,) = [each for each in told(log) if each["event"] == "thread.failed"]
    assert line["thread"] == "cleaning"


@pytest.mark.fault(57)
def test_a_database_that_vanishes_without_a_word_is_noticed_and_found_again(tmp_path: Path) -> None:
    namespace = find_namespace()
    if not namespace:
        pytest.skip("there is no network namespace in which packets may be dropped")
    subprocess.run([*namespace, sys.executable, "-m", "tests.black_hole", str(tmp_path)], check=True, cwd=ROOT)
