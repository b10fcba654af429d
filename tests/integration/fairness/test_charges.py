"""A tenant is charged for its use of the device while the use grows."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from core.db.models import Job, Pool
from core.db.models import Tenant as TenantRow
from core.db.session import service_transaction
from core.domain.scheduling import ENTRY_CHARGE_SECONDS
from core.services import attempts, charges, claims
from tests.factories.bases import POOL
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant
from tests.integration.fairness.sharing import claim, set_usage, train


def usage(owner: Engine, tenant: Tenant) -> float:
    with service_transaction(owner) as session:
        return session.get_one(TenantRow, tenant.id).usage_seconds


def test_a_claim_is_charged_what_its_steps_are_known_to_use_up_to_a_slots_quantum(
    worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    job = queue_job(owner, tenant)
    with service_transaction(owner) as session:
        session.get_one(Job, job.id).total_steps = 20_000
    lease = claim(worker)
    assert usage(owner, tenant) == pytest.approx(ENTRY_CHARGE_SECONDS), "nothing was measured yet"
    train(owner, lease, steps=10)
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, lease)
        charges.record_usage(session, lease.token, gpu_seconds=5.0, trained_tokens=1)
    assert usage(owner, tenant) == pytest.approx(5, abs=0.1)
    with service_transaction(owner) as session:
        assert session.get_one(Pool, POOL).step_seconds == pytest.approx(0.5)
    again = claim(worker)
    assert usage(owner, tenant) == pytest.approx(5 + 75, abs=0.1), "19,990 steps of half a second, up to a quantum"
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, again)
        charges.record_usage(session, again.token, gpu_seconds=0.0, trained_tokens=0)
    with service_transaction(owner) as session:
        session.get_one(Job, job.id).total_steps = 30
    claim(worker)
    assert usage(owner, tenant) == pytest.approx(5 + 20 * 0.5, abs=0.1), "20 steps"


def test_use_is_charged_as_it_grows_beyond_the_entry_charge_and_corrected_at_the_end(
    worker: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    queue_job(owner, other_tenant)
    leases = {lease.tenant_id: lease for lease in (claim(worker), claim(worker))}
    mine, others = leases[tenant.id], leases[other_tenant.id]
    for used, charged in ((20.0, 60), (70.0, 70), (65.0, 70), (500.0, 500)):
        with service_transaction(worker) as session:
            charges.charge_use(session, {mine.token: used, others.token: 1.0})
        assert usage(owner, tenant) == pytest.approx(charged, abs=0.2), used
    assert usage(owner, other_tenant) == pytest.approx(60, abs=0.1)
    with service_transaction(worker) as session:
        charges.record_usage(session, mine.token, gpu_seconds=510.0, trained_tokens=1)
        charges.record_usage(session, others.token, gpu_seconds=2.0, trained_tokens=1)
        charges.charge_use(session, {mine.token: 510.0})
    assert usage(owner, tenant) == pytest.approx(510, abs=0.5)
    assert usage(owner, other_tenant) == pytest.approx(2, abs=0.1)


def test_a_months_quota_counts_what_running_attempts_have_used(worker: Engine, owner: Engine, tenant: Tenant) -> None:
    set_usage(owner, tenant, 0, max_gpu_seconds_per_month=100)
    queue_job(owner, tenant)
    queue_job(owner, tenant)
    lease = claim(worker)
    with service_transaction(worker) as session:
        charges.charge_use(session, {lease.token: 101.0})
        assert claims.claim_job(session, POOL, worker_name="w", lease_seconds=60) is None
