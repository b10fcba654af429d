"""Waiting jobs get an event when their base is being loaded, and another with the result."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import psycopg
import pytest
from sqlalchemy import Engine, select, text

from core.db.models import Event, Job
from core.db.session import service_transaction
from core.services import announcements
from core.services.events import EVENT_CHANNEL
from core.services.jobs import cancel_job, get_job
from core.services.turns import record_load
from tests.databases import Database, run
from tests.factories.bases import BASE_MODEL, POOL
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant
from tests.waiting import PATIENCE_SECONDS


@pytest.fixture
def worker(worker: Engine, owner: Engine) -> Engine:
    """The worker's role on a queue that is empty of other tests' jobs."""
    run(owner, "truncate jobs cascade")
    run(owner, "update tenants set usage = 0, lift = 0")
    run(owner, "update base_models set state = 'unchecked', state_reason = null, checked_by = null")
    run(owner, "delete from pools")
    return worker


def announce(worker: Engine, *, num_jobs: int) -> Sequence[uuid.UUID]:
    with service_transaction(worker) as session:
        return announcements.announce_load(session, POOL, base_model_id=BASE_MODEL, num_jobs=num_jobs)


def told(owner: Engine, job: Job) -> list[str]:
    query = select(Event.message).where(Event.job_id == job.id).order_by(Event.number)
    with service_transaction(owner) as session:
        return list(session.scalars(query))[1:]  # behind that of its submission


def test_the_first_jobs_that_may_start_are_told_of_a_load_with_its_seconds(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    first, second, urgent = (
        queue_job(owner, tenant),
        queue_job(owner, tenant),
        queue_job(owner, tenant, priority=5),
    )
    others, later = queue_job(owner, other_tenant), queue_job(owner, other_tenant)
    with service_transaction(owner) as session:
        session.execute(text("update jobs set run_after = 'infinity' where id = :id"), {"id": later.id})
    ids = announce(worker, num_jobs=3)
    assert set(ids) == {urgent.id, first.id, others.id}
    assert told(owner, urgent) == [f"A worker is loading the base model {BASE_MODEL}."]
    assert told(owner, second) == told(owner, later) == []
    with service_transaction(owner) as session:
        cancel_job(session, tenant.id, job_id=urgent.id)
    with service_transaction(worker) as session:
        announcements.announce_loaded(session, ids, seconds=12.34)
        record_load(session, POOL, seconds=42.0)
    assert told(owner, first)[-1] == "The base model was loaded in 12.3 s."
    assert told(owner, urgent)[-1] == "The job was cancelled.", "it waits no more"
    again = announce(worker, num_jobs=1)
    assert told(owner, first)[-1] == f"A worker is loading the base model {BASE_MODEL}; the last time that took 42.0 s."
    with service_transaction(worker) as session:
        announcements.announce_unloaded(session, again, base_model_id=BASE_MODEL)
    assert told(owner, first)[-1].startswith(f"The worker could not load the base model {BASE_MODEL}; the job waits")


def test_a_job_that_somebody_changes_at_the_moment_keeps_nobody_from_loading(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    busy, free = queue_job(owner, tenant), queue_job(owner, tenant)
    with service_transaction(owner) as changing:
        get_job(changing, tenant.id, job_id=busy.id, lock=True)
        assert announce(worker, num_jobs=5) == [free.id]


def test_those_who_follow_a_job_are_woken(worker: Engine, owner: Engine, database: Database, tenant: Tenant) -> None:
    job = queue_job(owner, tenant)
    with psycopg.connect(database.superuser_url, autocommit=True) as listening:
        listening.execute(f"listen {EVENT_CHANNEL}")
        announce(worker, num_jobs=5)
        (notice,) = listening.notifies(timeout=PATIENCE_SECONDS, stop_after=1)
    assert notice.payload == str(job.id)
