"""Garbage is deleted, and never an object that a row names."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

import pytest
from sqlalchemy import Engine, select, text

from core.db.models import Job, Usage
from core.db.models import Tenant as TenantRow
from core.db.session import service_transaction
from core.domain.failures import Failure
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.objects import attempt_prefix, file_key
from core.services import attempts, charges
from core.services.files import create_file
from core.services.promises import check_objects
from core.storage import S3ObjectStore
from schedule.sweeper import settle, sweep
from tests.factories.jobs import age_jobs, claim, finish, queue_job
from tests.factories.objects import keys, put
from tests.factories.tenants import Tenant
from tests.sessions import any_role_transaction
from tests.waiting import wait_until

DAY = dt.timedelta(days=1)


def test_what_an_attempt_that_did_not_win_has_left_goes_a_day_after_the_job_and_what_rows_name_stays(
    schedule: Engine, worker: Engine, owner: Engine, store: S3ObjectStore, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    lost = claim(worker, lease_seconds=-1)
    assert lost is not None
    put(store, attempt_prefix(lost.tenant_id, lost.job_id, lost.token) + "adapter/from-the-lost")
    with service_transaction(schedule) as session:
        assert attempts.expire_leases(session) == 1
    with service_transaction(owner) as session:
        session.execute(text("update jobs set run_after = now()"))
    lease = claim(worker)
    assert lease is not None
    put(store, attempt_prefix(lease.tenant_id, lease.job_id, lease.token) + "checkpoints/step-9/never-named")
    sweep(schedule, store, min_age=DAY)
    finish(worker, store, lease)
    age_jobs(owner, 0.9)
    assert sweep(schedule, store, min_age=DAY) == 0
    assert keys(store, tenant) == {"from-the-lost", "never-named", "a", "r.csv"}
    age_jobs(owner, 0.2)
    assert sweep(schedule, store, min_age=DAY) == 2
    assert keys(store, tenant) == {"a", "r.csv"}
    assert sweep(schedule, store, min_age=DAY) == 0
    with any_role_transaction(owner) as session:
        assert check_objects(session, store, is_deep=True).num_broken == 1, (
            "the dataset's row of this test has no object"
        )


def test_a_job_that_has_not_ended_is_not_swept_however_old(
    schedule: Engine, worker: Engine, owner: Engine, store: S3ObjectStore, tenant: Tenant
) -> None:
    queue_job(owner, tenant)
    lease = claim(worker)
    assert lease is not None
    put(store, attempt_prefix(lease.tenant_id, lease.job_id, lease.token) + "resume/state")
    with service_transaction(owner) as session:
        session.execute(text("update jobs set created_at = now() - interval '9 days'"))
    sweep(schedule, store, min_age=DAY)
    assert keys(store, tenant) == {"state"}


def old_id(age: dt.timedelta) -> uuid.UUID:
    milliseconds = int((dt.datetime.now(dt.UTC) - age).timestamp() * 1000)
    return uuid.UUID(int=(milliseconds << 80) | (new_id().int & ((1 << 80) - 1)))


def test_an_upload_without_a_row_goes_after_a_day_and_one_with_a_row_or_of_today_stays(
    schedule: Engine, owner: Engine, store: S3ObjectStore, tenant: Tenant
) -> None:
    orphan, fresh, owned = old_id(2 * DAY), new_id(), old_id(2 * DAY)
    for file_id in (orphan, fresh, owned):
        put(store, file_key(tenant.id, file_id))
    with service_transaction(owner) as session:
        create_file(session, tenant.id, new=NewFile(owned, "a", "fine-tune", file_key(tenant.id, owned), 1, "0" * 64))
    sweep(schedule, store, min_age=DAY)
    kept = set(store.list_keys(f"tenants/{tenant.id}/"))
    assert kept == {file_key(tenant.id, fresh), file_key(tenant.id, owned)}


@pytest.mark.fault(4)
def test_a_multipart_upload_that_nobody_completes_is_given_up_after_its_time(
    schedule: Engine, store: S3ObjectStore, tenant: Tenant
) -> None:
    key = file_key(tenant.id, new_id())
    store._client._create_multipart_upload(store._bucket, key, {})
    sweep(schedule, store, min_age=DAY)
    assert len(store._client._list_multipart_uploads(store._bucket, prefix=key).uploads) == 1

    def is_given_up() -> bool:
        sweep(schedule, store, min_age=dt.timedelta(seconds=0))
        return not store._client._list_multipart_uploads(store._bucket, prefix=key).uploads

    wait_until(is_given_up)  # not at once: the server counts whole seconds


def test_an_attempt_whose_worker_was_lost_is_booked_as_nothing_once_and_its_charge_returned(
    schedule: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    with service_transaction(owner) as session:  # the entry charge is that of a pool of which nothing was measured
        session.execute(text("delete from pools"))
    queue_job(owner, tenant)
    lost = claim(worker, lease_seconds=-1)
    assert lost is not None
    with service_transaction(schedule) as session:
        attempts.expire_leases(session)
    settle(schedule)
    assert usage_of(owner, tenant) == ([], near(60, rel=1e-3)), "its worker may still report"
    with service_transaction(owner) as session:
        session.execute(text("update attempts set ended_at = ended_at - interval '11 minutes'"))
    assert settle(schedule) == 1
    assert settle(schedule) == 0
    assert usage_of(owner, tenant) == ([0.0], near(0, abs=0.1))
    with service_transaction(worker) as session:
        charges.record_usage(session, lost.token, gpu_seconds=9.0, trained_tokens=9)
    assert usage_of(owner, tenant)[0] == [0.0]


def lose_after_charge(schedule: Engine, worker: Engine, owner: Engine, tenant: Tenant, *, ago: str) -> None:
    """Claim a job, charge 100 seconds for it, and lose its worker so long ago."""
    queue_job(owner, tenant)
    lost = claim(worker, lease_seconds=60)
    assert lost is not None
    with service_transaction(worker) as session:
        charges.charge_use(session, {lost.token: 100.0})
    with service_transaction(owner) as session:
        expire = text("update jobs set lease_until = now() - interval '1 s', trained_steps = 1 where id = :id")
        session.execute(expire, {"id": lost.job_id})
    with service_transaction(schedule) as session:
        attempts.expire_leases(session)
    with service_transaction(owner) as session:
        age = text("update attempts set ended_at = ended_at - cast(:ago as interval) where job_id = :id")
        session.execute(age, {"id": lost.job_id, "ago": ago})


def test_what_a_lost_worker_has_charged_is_booked(
    schedule: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    lose_after_charge(schedule, worker, owner, tenant, ago="11 minutes")
    assert settle(schedule) >= 1
    assert usage_of(owner, tenant) == ([100.0], near(100, rel=1e-3))


def test_what_was_charged_while_no_schedule_ran_for_a_month_is_booked_however_much_it_is(
    schedule: Engine, worker: Engine, owner: Engine, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.services.garbage._LIMIT", 2)
    settle(schedule)
    with service_transaction(owner) as session:
        session.execute(text("update retention_marks set finished_at = finished_at - interval '30 days'"))
    for _ in range(5):
        lose_after_charge(schedule, worker, owner, tenant, ago="29 days")
    assert settle(schedule) == 5
    assert usage_of(owner, tenant)[0] == [100.0] * 5
    with service_transaction(owner) as session:
        session.execute(text("delete from usage"))
    assert settle(schedule) == 0, "it has looked at that time"


def usage_of(owner: Engine, tenant: Tenant) -> tuple[list[float], float]:
    with service_transaction(owner) as session:
        booked = session.scalars(select(Usage.gpu_seconds).where(Usage.tenant_id == tenant.id)).all()
        return list(booked), session.get_one(TenantRow, tenant.id).usage_seconds


def near(seconds: float, **bounds: Any) -> Any:
    return pytest.approx(seconds, **bounds)


def test_every_job_of_many_is_swept_once(
    schedule: Engine, worker: Engine, owner: Engine, store: S3ObjectStore, tenant: Tenant
) -> None:
    for _ in range(3):
        queue_job(owner, tenant)
        lease = claim(worker)
        assert lease is not None
        put(store, attempt_prefix(lease.tenant_id, lease.job_id, lease.token) + "adapter/x")
        with service_transaction(worker) as session:
            attempts.fail_attempt(session, lease, failure=Failure(code="x", message="x"), is_job_fault=True)
    age_jobs(owner, 2)
    assert sweep(schedule, store, min_age=DAY) == 3
    with service_transaction(owner) as session:
        assert session.scalars(select(Job.id).where(Job.swept_at.is_(None))).all() == []
