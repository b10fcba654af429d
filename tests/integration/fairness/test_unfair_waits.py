"""The check of promise I9 finds a job that waits behind the jobs of a tenant that used more."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import Engine, text

from core.db.session import service_transaction
from core.domain.scheduling import FairnessTerms
from core.domain.workers import WorkerFacts
from core.services.promises import check_rows
from tests.factories.bases import NF4_POOL, POOL
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant
from tests.integration.fairness.sharing import add_worker, hold_slots, set_usage, train
from tests.sessions import any_role_transaction

FAIRNESS = FairnessTerms()


def broken(owner: Engine, promise: str) -> tuple[str, ...]:
    with any_role_transaction(owner) as session:
        (finding,) = (each for each in check_rows(session, FAIRNESS) if each.promise == promise)
    return finding.broken


@pytest.fixture
def waits_too_long(worker: Engine, owner: Engine, tenant: Tenant) -> uuid.UUID:
    """A job that has waited for an hour, in a pool that the worker w serves too."""
    del worker  # the queues are empty
    job = queue_job(owner, tenant, quantization="nf4")
    add_worker(owner, WorkerFacts("w", (POOL, NF4_POOL), "serving", POOL, 8, 8))
    with service_transaction(owner) as session:
        session.execute(text("update jobs set run_after = now() - interval '1 hour'"))
    return job.id


@pytest.mark.usefixtures("waits_too_long")
def test_i9_finds_a_slot_that_a_tenant_which_used_more_holds_for_too_long(
    worker: Engine, owner: Engine, other_tenant: Tenant
) -> None:
    (lease,) = hold_slots(owner, worker, other_tenant, count=1, seconds_ago=3000)
    assert broken(owner, "I9") == (), "it has not used more"
    set_usage(owner, other_tenant, 5000)
    assert any("holds a slot of w" in found for found in broken(owner, "I9"))
    train(owner, lease, seconds_ago=60)
    assert not any("holds a slot of w" in found for found in broken(owner, "I9")), "its quantum has only begun"


@pytest.mark.usefixtures("waits_too_long")
def test_i9_finds_later_jobs_of_a_tenant_which_used_more(worker: Engine, owner: Engine, other_tenant: Tenant) -> None:
    hold_slots(owner, worker, other_tenant, count=1, seconds_ago=10)
    set_usage(owner, other_tenant, 5000)
    (found,) = broken(owner, "I9")
    assert "starts later jobs" in found


def test_i9_finds_an_older_job_whose_tenants_younger_ones_are_started(
    worker: Engine, owner: Engine, tenant: Tenant, waits_too_long: uuid.UUID
) -> None:
    """What was seen: an NF4 job waited while its tenant's later LoRA jobs came one after the other."""
    with service_transaction(owner) as session:
        session.execute(text("update tenants set max_running = 1 where id = :id"), {"id": tenant.id})
    hold_slots(owner, worker, tenant, count=1, seconds_ago=10)
    (found,) = broken(owner, "I9")
    assert found == f"job {waits_too_long} waits in {NF4_POOL} while w starts younger jobs of its tenant"


@pytest.mark.usefixtures("waits_too_long")
def test_i9_has_nothing_against_a_tenant_that_waits_for_its_own_quota(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    hold_slots(owner, worker, other_tenant, count=1, seconds_ago=3000)
    set_usage(owner, other_tenant, 5000)
    set_usage(owner, tenant, 0, max_running=0)
    assert broken(owner, "I9") == ()
