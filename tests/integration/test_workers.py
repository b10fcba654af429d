"""Workers report that they are alive, and stop reporting."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, text

from core.db.clock import DatabaseClock
from core.db.models import Worker
from core.db.session import connect, service_transaction
from core.domain.workers import WorkerFacts
from core.services import oversight
from core.services.workers import forget_worker, record_worker
from tests.databases import Database
from tests.sessions import any_role_transaction
from tests.waiting import wait_until
from worker.supervisor.identity import WorkerIdentity
from worker.supervisor.presence import Presence


@pytest.fixture
def engine(database: Database) -> Iterator[Engine]:
    made = connect(database.worker_url)
    yield made
    made.dispose()


def row_of(owner: Engine, name: str) -> Worker:
    with service_transaction(owner) as session:
        return session.scalars(select(Worker).where(Worker.name == name)).one()


def alive(owner: Engine) -> dict[str, Worker]:
    with service_transaction(owner) as session:
        rows = session.scalars(select(Worker).where(Worker.alive_until > func.now())).all()
    return {row.name: row for row in rows}


def test_a_worker_is_seen_with_what_it_holds_until_it_closes(engine: Engine, owner: Engine) -> None:
    facts = [WorkerFacts("one", ("p", "q"), "idle")]
    presence = Presence(engine, DatabaseClock(engine), interval_seconds=0.5, describe=lambda: facts[-1])
    presence.start()
    wait_until(lambda: "one" in alive(owner))
    started_at = row_of(owner, "one").started_at
    facts.append(WorkerFacts("one", ("p", "q"), "serving", pool="q", slots=8, slots_in_use=3))
    wait_until(lambda: row_of(owner, "one").state == "serving")
    row = row_of(owner, "one")
    assert (row.pools, row.pool, row.slots, row.slots_in_use) == (["p", "q"], "q", 8, 3)
    assert row.started_at == started_at
    presence.close()
    assert "one" not in alive(owner)


def test_a_worker_that_beats_no_more_is_not_alive(engine: Engine, owner: Engine) -> None:
    idle = WorkerFacts("two", (), "idle")
    presence = Presence(engine, DatabaseClock(engine), interval_seconds=60, describe=lambda: idle)
    presence._beat()  # and then it is killed
    assert "two" in alive(owner)
    with service_transaction(owner) as session:
        session.execute(text("update workers set alive_until = alive_until - interval '181 seconds'"))
    assert "two" not in alive(owner), "three beats later"


def facts_of(identity: WorkerIdentity, **more: Any) -> WorkerFacts:
    return WorkerFacts(str(identity), ("p",), "serving", "p", 4, 3, given_name=identity.given_name, **more)


def test_two_workers_of_one_name_are_two_and_their_slots_add_up(engine: Engine, owner: Engine) -> None:
    identities = [WorkerIdentity.of_this_process("gpu-7") for _ in range(2)]
    assert str(identities[0]).startswith(f"gpu-7:{os.getpid()}:")
    with service_transaction(engine) as session:
        for identity in identities:
            record_worker(session, facts_of(identity), alive_seconds=60, is_start=True)
    with any_role_transaction(owner) as session:
        page = oversight.list_worker_overviews(session, limit=100)
    found = [worker for worker in page.items if worker.given_name == "gpu-7"]
    assert {worker.name for worker in found} == {str(identity) for identity in identities}
    assert sum(worker.slots for worker in found) == 8
    with service_transaction(engine) as session:
        forget_worker(session, str(identities[0]))
    assert str(identities[0]) not in alive(owner)
    assert str(identities[1]) in alive(owner), "each takes away its own row"


def test_a_worker_of_the_version_before_writes_its_row_beside_those_of_this_one(engine: Engine, owner: Engine) -> None:
    """What it executes, word for word: it knows neither identities nor clocks."""
    old = text("""
        insert into workers (name, pools, state, pool, slots, slots_in_use, pool_since, next_pool, refusals, version,
            heartbeat_at, alive_until)
        values ('gpu-8', array['p'], :state, null, 0, 0, null, null, '{}', '0.1.0', now(), now() + interval '15 seconds')
        on conflict (name) do update set name = excluded.name, pools = excluded.pools, state = excluded.state,
            pool = excluded.pool, heartbeat_at = now(), alive_until = now() + interval '15 seconds'
    """)
    with service_transaction(engine) as session:
        record_worker(session, facts_of(WorkerIdentity("gpu-8")), alive_seconds=60, is_start=True)
        for state in ("loading", "idle"):
            session.execute(old, {"state": state})
    with any_role_transaction(owner) as session:
        page = oversight.list_worker_overviews(session, limit=100)
    found = {worker.name: worker for worker in page.items if worker.given_name == "gpu-8"}
    assert len(found) == 2
    assert (found["gpu-8"].shown_state, found["gpu-8"].clock_offset_seconds) == ("idle", None)
    with service_transaction(engine) as session:
        session.execute(text("delete from workers where name = 'gpu-8'"))
    assert "gpu-8" not in alive(owner)


def test_the_row_of_a_worker_that_was_killed_is_gone_after_a_day(engine: Engine, owner: Engine) -> None:
    with service_transaction(engine) as session:
        record_worker(session, facts_of(WorkerIdentity("killed")), alive_seconds=-86_000, is_start=True)
        record_worker(session, facts_of(WorkerIdentity("long-killed")), alive_seconds=-87_000, is_start=True)
        record_worker(session, facts_of(WorkerIdentity("next")), alive_seconds=60, is_start=True)
    with service_transaction(owner) as session:
        names = set(session.scalars(select(Worker.given_name)))
    assert {"killed", "next"} <= names
    assert "long-killed" not in names
