"""When an attempt left the device: recorded once, with its own time, and checked for promise I10."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from core.db.session import DATABASE_ERRORS, connect, service_transaction
from core.domain.leases import Lease
from core.domain.scheduling import FairnessTerms
from core.domain.workers import WorkerFacts
from core.services import attempts, claims
from core.services.jobs import cancel_job
from core.services.promises import Finding, check_rows
from core.services.workers import record_worker
from tests.databases import Database
from tests.factories.bases import POOL
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant
from tests.sessions import any_role_transaction
from worker.supervisor.departures import Departures


@pytest.fixture
def worker(database: Database, owner: Engine) -> Iterator[Engine]:
    with service_transaction(owner) as session:
        session.execute(text("truncate jobs, workers cascade"))
    engine = connect(database.worker_url)
    record_alive(engine)
    yield engine
    engine.dispose()


def record_alive(worker: Engine) -> None:
    with service_transaction(worker) as session:
        record_worker(session, WorkerFacts("w", (POOL,), "serving"), alive_seconds=3600, is_start=True)


def cancelled(owner: Engine, worker: Engine, tenant: Tenant, *, seconds_ago: float) -> Lease:
    """Return the lease of a job that the worker claimed, and that was cancelled so long ago."""
    job = queue_job(owner, tenant)
    with service_transaction(worker) as session:
        claimed = claims.claim_job(session, POOL, worker_name="w", lease_seconds=60)
    assert claimed is not None
    assert claimed.lease_token is not None
    with service_transaction(owner) as session:
        cancel_job(session, tenant.id, job_id=job.id)
        past = "update attempts set ended_at = now() - make_interval(secs => :seconds) where job_id = :id"
        session.execute(text(past), {"seconds": seconds_ago, "id": job.id})
    return Lease(job.id, tenant.id, claimed.lease_token)


def record_departure(worker: Engine, lease: Lease, *, seconds_ago: float) -> None:
    with service_transaction(worker) as session:
        attempts.record_departure(session, lease, seconds_ago=seconds_ago)


def check_i10(owner: Engine) -> Finding:
    with any_role_transaction(owner) as session:
        (finding,) = (each for each in check_rows(session, FairnessTerms()) if each.promise == "I10")
    return finding


def seconds_on_device(owner: Engine, lease: Lease) -> float | None:
    """Return how long after its end an attempt left the device."""
    query = "select extract(epoch from left_device_at - ended_at) from attempts where lease_token = :token"
    with service_transaction(owner) as session:
        found = session.scalars(text(query), {"token": lease.token}).one()
    return None if found is None else float(found)


def test_a_cancelled_attempt_that_left_in_time_keeps_the_promise(owner: Engine, worker: Engine, tenant: Tenant) -> None:
    record_departure(worker, cancelled(owner, worker, tenant, seconds_ago=60), seconds_ago=57)
    cancelled(owner, worker, tenant, seconds_ago=0)  # which has some seconds left
    finding = check_i10(owner)
    assert (finding.num_checked, finding.broken) == (2, ())


def test_a_cancelled_attempt_that_left_late_breaks_the_promise(owner: Engine, worker: Engine, tenant: Tenant) -> None:
    record_departure(worker, cancelled(owner, worker, tenant, seconds_ago=60), seconds_ago=49)
    (broken,) = check_i10(owner).broken
    assert "left 00:00:1" in broken


def test_a_cancelled_attempt_that_never_left_breaks_the_promise_while_its_worker_lives(
    owner: Engine, worker: Engine, tenant: Tenant
) -> None:
    cancelled(owner, worker, tenant, seconds_ago=11)
    (broken,) = check_i10(owner).broken
    assert broken.endswith("has not left w")
    with service_transaction(owner) as session:
        session.execute(text("update workers set alive_until = now() - interval '1 s'"))
    assert check_i10(owner).broken == (), "its worker is dead, and the device is free"
    record_alive(worker)
    assert check_i10(owner).broken == (), "its worker was started afresh since"


def test_what_was_said_first_of_a_departure_stays(owner: Engine, worker: Engine, tenant: Tenant) -> None:
    lease = cancelled(owner, worker, tenant, seconds_ago=60)
    assert seconds_on_device(owner, lease) is None
    record_departure(worker, lease, seconds_ago=57)
    first = seconds_on_device(owner, lease)
    assert first is not None
    assert 3 <= first < 60
    record_departure(worker, lease, seconds_ago=0)
    assert seconds_on_device(owner, lease) == first


def test_a_departure_is_recorded_with_its_own_time_once_the_database_is_back(
    owner: Engine, worker: Engine, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = cancelled(owner, worker, tenant, seconds_ago=60)
    away = connect("postgresql://nobody@127.0.0.1:1/none")
    departures = Departures(away)
    departures.expect(lease)
    departures.note(lease.token)
    with pytest.raises(DATABASE_ERRORS):
        departures.record()
    was_due = departures.are_due
    assert was_due
    monkeypatch.setattr(departures, "_engine", worker)
    noted_at = departures._unrecorded[0].left_at
    monkeypatch.setattr(time, "monotonic", lambda: noted_at + 40)
    departures.record()
    monkeypatch.undo()
    assert not departures.are_due
    left_after = seconds_on_device(owner, lease)
    assert left_after is not None
    assert 20 <= left_after < 60
    away.dispose()


def test_a_trainer_that_is_gone_has_nobody_on_its_device(owner: Engine, worker: Engine, tenant: Tenant) -> None:
    leases = [cancelled(owner, worker, tenant, seconds_ago=1) for _ in range(2)]
    departures = Departures(worker)
    for lease in leases:
        departures.expect(lease)
    departures.note(leases[0].token)
    departures.note_all()
    departures.record()
    departures.note(leases[1].token)  # it is known already
    assert not departures.are_due
    assert all(seconds_on_device(owner, lease) is not None for lease in leases)
