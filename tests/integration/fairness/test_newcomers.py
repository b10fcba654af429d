"""A new tenant starts level with the tenants that train already."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from core.db.models import Tenant as TenantRow
from core.db.session import service_transaction
from core.domain.failures import Failure
from core.services import attempts, charges
from core.services.jobs import pause_job, resume_job
from tests.databases import Database, opened
from tests.factories.jobs import queue_job
from tests.factories.tenants import Tenant
from tests.integration.fairness.sharing import claim, hold_slots, set_usage
from tests.sessions import any_role_transaction


@pytest.fixture
def schedule(database: Database) -> Iterator[Engine]:
    with opened(database.schedule_url) as engine:
        yield engine


def level(schedule: Engine) -> None:
    with service_transaction(schedule) as session:
        newcomers = charges.list_newcomers(session)
    for tenant_id in newcomers:
        with service_transaction(schedule) as session:
            charges.level_newcomer(session, tenant_id)
    with service_transaction(schedule) as session:
        assert charges.list_newcomers(session) == []


def account(owner: Engine, tenant: Tenant) -> float:
    with service_transaction(owner) as session:
        row = session.get_one(TenantRow, tenant.id)
        return (row.usage_seconds + row.lift_seconds) / row.weight


def test_a_newcomer_starts_a_quantum_of_a_slot_before_the_level_and_its_usage_stays_true(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    hold_slots(owner, worker, tenant, count=2, seconds_ago=0)
    level(schedule)
    set_usage(owner, tenant, 30_000)
    queue_job(owner, other_tenant)
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(30_000 - 75, rel=1e-3)
    with service_transaction(owner) as session:
        assert session.get_one(TenantRow, other_tenant.id).usage_seconds == 0
    assert claim(worker).tenant_id == other_tenant.id


def test_who_comes_back_is_not_behind_for_what_it_used_of_an_idle_device(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    hold_slots(owner, worker, tenant, count=2, seconds_ago=0)
    level(schedule)
    set_usage(owner, tenant, 1_000)
    set_usage(owner, other_tenant, 30_000)
    queue_job(owner, other_tenant)
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(1_000, rel=1e-3)
    queue_job(owner, tenant)
    assert account(owner, tenant) == pytest.approx(1_000, rel=1e-3)


def test_who_trains_or_waits_already_keeps_its_place(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    hold_slots(owner, worker, tenant, count=2, seconds_ago=0)
    hold_slots(owner, worker, other_tenant, count=1, seconds_ago=0)
    level(schedule)
    set_usage(owner, tenant, 10_000)
    set_usage(owner, other_tenant, 30_000)
    queue_job(owner, other_tenant)  # it trains, and nothing of it waited
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(30_000, rel=1e-3)
    set_usage(owner, other_tenant, 100)
    queue_job(owner, other_tenant)  # something of it waits
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(100, rel=1e-3)


def test_who_trained_a_moment_ago_is_not_forgiven_and_sets_the_level(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    """Else a tenant would lose what it used by coming with one job after another, and others would come before it."""
    (lease,) = hold_slots(owner, worker, tenant, count=1, seconds_ago=0)
    level(schedule)
    with service_transaction(worker) as session:
        attempts.fail_attempt(session, lease, failure=Failure(code="over", message="Over."), is_job_fault=True)
    set_usage(owner, tenant, 50_000)
    hold_slots(owner, worker, other_tenant, count=1, seconds_ago=0)
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(50_000 - 75, rel=1e-2), "nobody trained just then"
    queue_job(owner, tenant)
    level(schedule)
    assert account(owner, tenant) == pytest.approx(50_000, rel=1e-2)
    with service_transaction(owner) as session:
        session.execute(text("update attempts set ended_at = now() - interval '2 h' where outcome is not null"))
    set_usage(owner, other_tenant, 1_000)
    with service_transaction(owner) as session:
        session.execute(text("update queues set is_new = true where tenant_id = :id"), {"id": tenant.id})
    level(schedule)
    assert account(owner, tenant) == pytest.approx(1_000, rel=1e-2), "it was away"


def test_who_resumes_has_no_credit_for_the_time_in_which_it_paused(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    job = queue_job(owner, other_tenant)
    with any_role_transaction(owner) as session:
        pause_job(session, other_tenant.id, job_id=job.id)
    level(schedule)
    hold_slots(owner, worker, tenant, count=1, seconds_ago=0)
    level(schedule)
    set_usage(owner, tenant, 30_000)
    with any_role_transaction(owner) as session:
        resume_job(session, other_tenant.id, job_id=job.id)
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(30_000 - 75, rel=1e-2)


def test_who_waits_in_one_pool_loses_nothing_by_a_job_in_another(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    hold_slots(owner, worker, tenant, count=1, seconds_ago=0)
    queue_job(owner, other_tenant)
    level(schedule)
    set_usage(owner, tenant, 30_000)
    set_usage(owner, other_tenant, 10_000)
    queue_job(owner, other_tenant, quantization="nf4")
    level(schedule)
    assert account(owner, other_tenant) == pytest.approx(10_000, rel=1e-3)


def test_the_greatest_difference_of_weights_and_uses_is_a_number(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    hold_slots(owner, worker, tenant, count=1, seconds_ago=0)
    level(schedule)
    set_usage(owner, tenant, 1e12, weight=0.01)
    set_usage(owner, other_tenant, 0, weight=1000)
    queue_job(owner, other_tenant)
    level(schedule)
    assert account(owner, other_tenant) > 0


def test_nobody_is_moved_where_nobody_else_trains(
    worker: Engine, owner: Engine, schedule: Engine, tenant: Tenant
) -> None:
    hold_slots(owner, worker, tenant, count=1, seconds_ago=0)
    set_usage(owner, tenant, 10_000)
    queue_job(owner, tenant)
    level(schedule)
    assert account(owner, tenant) == pytest.approx(10_000, rel=1e-3)
