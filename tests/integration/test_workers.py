"""Workers say that they are alive, and fall silent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, func, select, text

from core.db.models import Worker
from core.db.session import connect, service_transaction
from core.services.workers import WorkerFacts
from tests.integration.conftest import Database
from tests.waiting import wait_until
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
    presence = Presence(engine, interval_seconds=0.5, describe=lambda: facts[-1])
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
    presence = Presence(engine, interval_seconds=60, describe=lambda: WorkerFacts("two", (), "idle"))
    presence._beat()  # and then it is killed
    assert "two" in alive(owner)
    with service_transaction(owner) as session:
        session.execute(text("update workers set alive_until = alive_until - interval '181 seconds'"))
    assert "two" not in alive(owner), "three beats later"
