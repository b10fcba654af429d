"""An old job is deleted once nothing that it made is still needed. Its bill stays."""

from __future__ import annotations

from collections import Counter

from sqlalchemy import Engine, select, text

from core.db.models import SetAside
from core.db.session import service_transaction
from core.services.retention import Kind
from core.storage import S3ObjectStore
from schedule.forgetter import forget
from schedule.purger import purge
from schedule.sweeper import sweep
from tests.factories.jobs import age_jobs, queue_job
from tests.factories.objects import keys
from tests.factories.tenants import Tenant
from tests.integration.retention.ageing import (
    DAY,
    age_all,
    delete_models,
    end_job,
    fail_job,
    find_broken,
    jobs_left,
    plant,
    run_all,
    run_statements,
    used_by_pool,
)


def test_an_old_job_goes_once_nothing_that_it_made_is_left_and_its_bill_stays(
    schedule: Engine, worker: Engine, owner: Engine, store: S3ObjectStore, tenant: Tenant
) -> None:
    kept, spent = (end_job(worker, owner, store, tenant) for _ in range(2))
    failed = fail_job(worker, owner, tenant)
    live = queue_job(owner, tenant)
    delete_models(owner, spent)
    age_all(owner, 800)
    used = used_by_pool(owner)
    assert (used[0].num_jobs, used[0].gpu_seconds) == (3, 13)
    assert run_all(schedule, Kind.JOBS, days=730)[0].total() == 0, "what is not swept or purged is waited for"
    sweep(schedule, store, min_age=DAY)
    purge(schedule, store, may_go_on=lambda _: True)
    forget(schedule, {Kind.EVENTS: 365, Kind.JOBS: 730}, may_go_on=lambda _: True)
    assert jobs_left(owner) == {kept.job_id, live.id}
    assert failed.job_id not in jobs_left(owner)
    assert used_by_pool(owner) == used
    assert find_broken(owner) == []
    assert keys(store, tenant) == {"a", "r.csv"}, "the adapter, the checkpoint and the result of the job that stays"
    delete_models(owner, kept)
    purge(schedule, store, may_go_on=lambda _: True)
    assert keys(store, tenant) == {"r.csv"}, "those of jobs that are gone went with them"
    forget(schedule, {Kind.JOBS: 730}, may_go_on=lambda _: True)
    purge(schedule, store, may_go_on=lambda _: True)
    assert jobs_left(owner) == {live.id}
    assert keys(store, tenant) == set()
    assert used_by_pool(owner) == used
    assert find_broken(owner) == []


def test_a_job_whose_use_is_not_booked_yet_stays_and_one_that_is_young(
    schedule: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    unbooked, young = fail_job(worker, owner, tenant), fail_job(worker, owner, tenant)
    with service_transaction(owner) as session:
        session.execute(
            text(
                "delete from usage where gpu_seconds = 3 and attempt_id in (select id from attempts where job_id = :id)"
            ),
            {"id": unbooked.job_id},
        )
    run_statements(owner, "update jobs set swept_at = now() where finished_at is not null")
    age_jobs(owner, 20)
    run_statements(owner, f"update jobs set finished_at = now() - interval '9 days' where id = '{young.job_id}'")
    run_all(schedule, Kind.JOBS, days=10)
    assert {unbooked.job_id, young.job_id} <= jobs_left(owner)


def test_old_checkpoints_go_with_their_objects_and_adapters_never_do(
    schedule: Engine, worker: Engine, owner: Engine, store: S3ObjectStore, tenant: Tenant
) -> None:
    old = end_job(worker, owner, store, tenant)
    age_all(owner, 40)
    young = end_job(worker, owner, store, tenant)
    assert run_all(schedule, Kind.CHECKPOINTS, days=30) == [Counter(checkpoints=1), Counter(checkpoints=0)]
    purge(schedule, store, may_go_on=lambda _: True)
    left = {key.split("/", 4)[-1] for key in store.list_keys(f"tenants/{tenant.id}/")}
    assert left == {
        f"{old.token}/adapter/a",
        f"{old.token}/result/r.csv",
        f"{young.token}/adapter/a",
        f"{young.token}/result/r.csv",
        f"{young.token}/checkpoints/step-1/a",
    }
    assert find_broken(owner) == []


REFUSE = """
create function refuse() returns trigger language plpgsql as $$ begin
    raise exception 'the test needs it' using errcode = 'integrity_constraint_violation';
end $$
"""


def test_a_job_that_cannot_be_deleted_is_set_aside_and_holds_up_nobody(
    schedule: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    stuck = fail_job(worker, owner, tenant)
    run_statements(owner, "update jobs set swept_at = now() where finished_at is not null")
    age_all(owner, 800)
    plant(owner, tenant, days=799)
    when = f"for each row when (old.id = '{stuck.job_id}') execute function refuse()"
    run_statements(owner, REFUSE, f"create trigger refuse before delete on jobs {when}")
    try:
        deleted = run_all(schedule, Kind.JOBS, days=730)
        assert sum(each["jobs"] for each in deleted) == 1
        with service_transaction(owner) as session:
            aside = session.scalars(select(SetAside)).one()
        assert (aside.duty, aside.row_id, aside.reason) == ("forget", stuck.job_id, "the test needs it")
        assert find_broken(owner) == []
    finally:
        run_statements(owner, "drop function refuse cascade")
    run_statements(owner, "update set_asides set retry_at = now()")
    assert sum(each["jobs"] for each in run_all(schedule, Kind.JOBS, days=730)) == 1
