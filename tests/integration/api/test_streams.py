"""A job's events as they happen: all of them, once, in order, whichever process is restarted meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from sqlalchemy import Engine, text

from api.feeds import EventFeed
from api.routes.streams import TenantWatch, follow_stream
from core.db.migrate import login_url
from core.db.session import connect, service_transaction
from core.domain.bases import BaseModelEntry, BaseModelSource, Registry
from core.domain.ids import IdKind, format_id
from core.domain.leases import Lease
from core.services import announcements
from core.services.api_keys import revoke_api_key
from core.services.attempts import requeue_attempt
from core.services.jobs import cancel_job
from core.services.streams import Watch
from local.ports import free_ports
from local.servers import LocalServers, ServerAddresses
from local.stack import prepare_database
from tests.databases import LOGINS, Database
from tests.factories.bases import BASE_MODEL, POOL
from tests.factories.jobs import fail_job, queue_job, record_step, start_job
from tests.factories.tenants import Tenant, add_tenant
from tests.integration.api.events import Received, open_stream
from tests.processes import running_api
from tests.sessions import any_role_transaction
from tests.waiting import PATIENCE_SECONDS, wait_until


def wire_id(lease: Lease) -> str:
    return format_id(IdKind.JOB, lease.job_id)


def test_events_come_as_they_happen_and_the_stream_ends_with_the_job(
    api_url: str, owner: Engine, tenant: Tenant
) -> None:
    lease = start_job(owner, tenant)
    with open_stream(api_url, tenant.api_key, wire_id(lease)) as events:
        told = [next(events).body["message"], next(events).body["message"]]
        assert told == ["Validated the files and queued the job.", "Attempt 1 has started."]
        for step in (1, 2, 3):
            record_step(owner, lease, step)
            event = next(events)
            assert (event.kind, event.step) == ("metrics", step)
        fail_job(owner, lease)
        assert next(events).body["message"] == "The job has failed: It diverged."
        assert next(events) == Received(None, "end", {"status": "failed"})
        assert next(events, None) is None


def test_an_event_comes_by_its_notification_and_not_by_a_sweep(
    database: Database, owner: Engine, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.feeds.SWEEP_SECONDS", 3600.0)
    lease = start_job(owner, tenant)
    engine = connect(database.api_url)

    async def follow() -> list[str]:
        feed = EventFeed(engine, database.api_url)
        async with feed.running(), asyncio.timeout(PATIENCE_SECONDS):
            batches = feed.follow(tenant.id, Watch(lease.job_id, tenant.key_id, after=0))
            told = [event.type for event in (await anext(batches)).events]
            for step in (1, 2, 3):
                await asyncio.to_thread(record_step, owner, lease, step)
                told += [event.type for event in (await anext(batches)).events]
        return told

    assert asyncio.run(follow()) == ["message", "message", "metrics", "metrics", "metrics"]
    engine.dispose()


def test_a_quiet_stream_says_now_and_then_that_it_is_alive(
    database: Database, owner: Engine, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.feeds.IDLE_SECONDS", 0.05)
    lease = start_job(owner, tenant)
    engine = connect(database.api_url)

    async def follow() -> None:
        feed = EventFeed(engine, database.api_url)
        async with feed.running(), asyncio.timeout(PATIENCE_SECONDS):
            batches = follow_stream(feed, TenantWatch(tenant.id, Watch(lease.job_id, tenant.key_id, after=0)))
            told = [chunk async for chunk in until(batches, b": ping\n\n")]
        assert told[0].startswith(b": open\nretry: ")
        assert b"".join(told).count(b"event: message\n") == 2

    asyncio.run(follow())
    engine.dispose()


async def until(chunks: AsyncGenerator[bytes], last: bytes) -> AsyncGenerator[bytes]:
    async with aclosing(chunks):
        seen = b""
        async for chunk in chunks:
            seen += chunk
            yield chunk
            if chunk == last and b"event: message" in seen:
                return


@pytest.mark.fault(48)
def test_a_stream_goes_on_behind_the_last_event_that_its_client_has(
    api_url: str, owner: Engine, tenant: Tenant
) -> None:
    lease = start_job(owner, tenant)
    for step in range(1, 301):  # more than one batch
        record_step(owner, lease, step)
    fail_job(owner, lease)
    with open_stream(api_url, tenant.api_key, wire_id(lease)) as stream:
        whole = list(stream)
    assert len(whole) == 2 + 300 + 1 + 1
    numbers = [event.id for event in whole[:-1]]
    for seen in (0, 1, 150, 299, 302):
        with open_stream(api_url, tenant.api_key, wire_id(lease), after=numbers[seen]) as stream:
            assert list(stream) == whole[seen + 1 :]
    listed = httpx.get(
        f"{api_url}/v1/fine_tuning/jobs/{wire_id(lease)}/events",
        params={"limit": 100},
        headers={"authorization": f"Bearer {tenant.api_key}"},
        timeout=PATIENCE_SECONDS,
    ).json()["data"]
    assert [event.body for event in whole[-2:-102:-1]] == listed


def follow_to_the_end(api_url: str, tenant: Tenant, job_id: str) -> list[Received]:
    """Read a stream as a browser does: after a break, again from behind the last event."""
    events: list[Received] = []

    def has_ended() -> bool:
        after = events[-1].id if events else None
        with (
            suppress(httpx.TransportError, AssertionError),
            open_stream(api_url, tenant.api_key, job_id, after=after) as stream,
        ):
            for event in stream:
                if event.kind == "end":
                    return True
                events.append(event)
        return False

    wait_until(has_ended, what="the end of the stream")
    return events


def test_nothing_is_lost_or_repeated_when_the_api_is_killed_again_and_again(
    database: Database, servers: ServerAddresses, owner: Engine, tenant: Tenant
) -> None:
    (port,) = free_ports(1)
    lease = start_job(owner, tenant)
    with ThreadPoolExecutor(1) as client:
        following = client.submit(follow_to_the_end, f"http://127.0.0.1:{port}", tenant, wire_id(lease))
        step = 0
        for _ in range(3):
            with running_api(database.api_url, servers.storage, port=port) as api:
                for _ in range(60):
                    record_step(owner, lease, step := step + 1)
                api.kill()
            record_step(owner, lease, step := step + 1)
        with running_api(database.api_url, servers.storage, port=port):
            fail_job(owner, lease)
            events = following.result()
    assert [event.step for event in events if event.kind == "metrics"] == list(range(1, step + 1))
    assert len(events) == step + 3


@pytest.mark.fault(48)
def test_an_open_stream_outlives_a_restart_of_the_database(tmp_path: Path) -> None:
    entry = BaseModelEntry(
        id=BASE_MODEL,
        source=BaseModelSource(kind="path", location="/nowhere"),
        target_modules=("q_proj",),
        max_seq_len=256,
    )
    servers = LocalServers(tmp_path / "servers", is_durable=False)
    with servers:
        url = servers.addresses.postgres_url
        prepare_database(url, Registry(base_models=(entry,)), logins=LOGINS)
        owner = connect(url)
        tenant = add_tenant(owner)
        lease = start_job(owner, tenant)
        (port,) = free_ports(1)
        with (
            running_api(login_url(url, LOGINS[0]), servers.addresses.storage, port=port),
            open_stream(f"http://127.0.0.1:{port}", tenant.api_key, wire_id(lease)) as events,
        ):
            record_step(owner, lease, 1)
            assert [next(events).kind for _ in range(3)] == ["message", "message", "metrics"]
            owner.dispose()
            servers.stop()
            servers.start()
            assert servers.addresses.postgres_url == url
            record_step(owner, lease, 2)
            record_step(owner, lease, 3)
            assert [next(events).step, next(events).step] == [2, 3]
            fail_job(owner, lease)
            assert [next(events).kind, next(events).kind] == ["message", "end"]
        owner.dispose()


@pytest.mark.fault(47)
def test_a_stream_closes_soon_after_its_key_is_revoked(api_url: str, owner: Engine, tenant: Tenant) -> None:
    lease = start_job(owner, tenant)
    with open_stream(api_url, tenant.api_key, wire_id(lease)) as events:
        assert [next(events).kind, next(events).kind] == ["message", "message"]
        with any_role_transaction(owner) as session:
            revoke_api_key(session, tenant.id, key_id=tenant.key_id)
        last = next(events)
        assert (last.kind, last.body["error"]["code"]) == ("error", "invalid_api_key")
        assert next(events, None) is None


def test_a_key_that_expires_ends_its_stream_and_reads_no_event_more(
    api_url: str, owner: Engine, tenant: Tenant
) -> None:
    lease = start_job(owner, tenant)
    with open_stream(api_url, tenant.api_key, wire_id(lease)) as events:
        assert [next(events).kind, next(events).kind] == ["message", "message"]
        with service_transaction(owner) as session:
            session.execute(text("update api_keys set expires_at = now() where key_id = :id"), {"id": tenant.key_id})
        record_step(owner, lease, 1)
        assert next(events).kind == "error"


def test_streams_of_others_and_of_nothing_are_not_found(
    api_url: str, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    job_id = wire_id(start_job(owner, tenant))
    url = f"{api_url}/v1/fine_tuning/jobs/{job_id}/stream"
    for headers, status in (
        ({"authorization": f"Bearer {other_tenant.api_key}"}, 404),
        ({"authorization": "Bearer x"}, 401),
        ({"authorization": f"Bearer {tenant.api_key}", "last-event-id": "-1"}, 400),
        ({"authorization": f"Bearer {tenant.api_key}", "last-event-id": "9" * 30}, 400),
    ):
        answer = httpx.get(url, headers=headers, timeout=PATIENCE_SECONDS)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_many_open_streams_hold_few_connections_and_threads(
    database: Database, servers: ServerAddresses, owner: Engine
) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    leases = [(each, start_job(owner, each)) for each in (add_tenant(owner) for _ in range(5))]
    in_api = "select count(*) from pg_stat_activity where usename = 'espalier_api' and datname = current_database()"
    with running_api(database.api_url, servers.storage, port=port) as api, ExitStack() as stack:
        streams = [
            stack.enter_context(open_stream(url, owned.api_key, wire_id(lease)))
            for owned, lease in leases
            for _ in range(40)
        ]
        for events in streams:
            assert [next(events).kind, next(events).kind] == ["message", "message"]
        for _, lease in leases:
            record_step(owner, lease, 1)
        assert {next(events).kind for events in streams} == {"metrics"}
        with service_transaction(owner) as session:
            assert session.scalar(text(in_api)) <= 41  # the pool at its largest and one that listens
        assert psutil.Process(api.pid).num_threads() < 60
        api.terminate()
        api.wait()  # open streams do not hold the API's end up: it would wait for them for ever
        assert [next(events, None) for events in streams] == [None] * len(streams)


def test_events_of_a_job_are_recorded_under_the_lock_on_its_row(
    owner: Engine, database: Database, tenant: Tenant
) -> None:
    """The order of numbers is the order of commits only because of it."""
    guard = """
        create function refuse_unlocked() returns trigger language plpgsql as $$ begin
            -- A version of a savepoint's is not of the transaction's own number, and is seen by nobody else.
            if not exists (select from jobs where id = new.job_id and (
                pg_current_xact_id()::xid in (xmin, xmax) or pg_xact_status(((
                    pg_current_xact_id()::text::bigint >> 32 << 32) + xmin::text::bigint)::text::xid8) = 'in progress'))
            then
                raise exception 'an event without the lock on its job';
            end if;
            return new;
        end $$;
        create trigger refuse_unlocked before insert on events for each row execute function refuse_unlocked();
    """
    with service_transaction(owner) as session:
        session.execute(text(guard))
    try:
        worker = connect(database.worker_url)
        lease = start_job(owner, tenant)
        record_step(worker, lease, 1)
        with service_transaction(worker) as session:
            requeue_attempt(session, lease)
        fail_job(worker, start_job(owner, tenant))
        with service_transaction(owner) as session:
            cancel_job(session, tenant.id, job_id=queue_job(owner, tenant).id)
        queue_job(owner, tenant)
        with service_transaction(worker) as session:
            told = announcements.announce_load(session, POOL, base_model_id=BASE_MODEL, num_jobs=4)
            assert told
            announcements.announce_loaded(session, told, seconds=1.0)
        worker.dispose()
        unlocked = "insert into events (id, tenant_id, job_id, level, type, message) values (gen_random_uuid(), :t, :j, 'info', 'message', '')"
        with pytest.raises(Exception, match="without the lock"), service_transaction(owner) as session:
            session.execute(text(unlocked), {"t": tenant.id, "j": lease.job_id})
    finally:
        with service_transaction(owner) as session:
            session.execute(text("drop function refuse_unlocked cascade"))


def test_a_reader_never_misses_the_event_of_a_slower_writer(api_url: str, owner: Engine, tenant: Tenant) -> None:
    """Two writers of one job: the second draws its number only when the first has committed."""
    lease = start_job(owner, tenant)
    first_holds, may_commit = threading.Event(), threading.Event()

    def write_slowly() -> None:
        with service_transaction(owner) as session:
            session.execute(text("select from jobs where id = :id for update"), {"id": lease.job_id})
            requeue_attempt(session, lease)
            session.flush()
            first_holds.set()
            may_commit.wait()

    with ThreadPoolExecutor(2) as pool, open_stream(api_url, tenant.api_key, wire_id(lease)) as events:
        slow = pool.submit(write_slowly)
        first_holds.wait()

        def cancel() -> None:
            with service_transaction(owner) as session:
                cancel_job(session, tenant.id, job_id=lease.job_id)

        quick = pool.submit(cancel)
        may_commit.set()
        slow.result()
        quick.result()
        told = list(events)
    numbers = [event.id for event in told if event.id is not None]
    assert numbers == sorted(numbers)
    assert [event.body["message"] for event in told[2:-1]] == [
        "The worker gives the job back; it is queued again.",
        "The job was cancelled.",
    ]


def test_a_row_at_fault_ends_the_streams_of_its_tenant_and_nobody_elses(
    api_url: str, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    poisoned, sound = start_job(owner, tenant), start_job(owner, other_tenant)
    with owner.begin() as connection:
        connection.execute(text("update events set details = '[1]' where job_id = :id"), {"id": poisoned.job_id})
    with open_stream(api_url, tenant.api_key, wire_id(poisoned)) as events:
        assert next(events, None) is None
    with open_stream(api_url, other_tenant.api_key, wire_id(sound)) as events:
        assert next(events).body["message"] == "Validated the files and queued the job."
