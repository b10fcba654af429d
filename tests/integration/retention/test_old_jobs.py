"""Rows do not pile up for ever: what is old goes in small transactions, and nothing that somebody still needs."""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Engine, Row, select, text
from sqlalchemy.exc import IntegrityError, ProgrammingError

from core.db.models import Job, SetAside
from core.db.session import owner_transaction, service_transaction
from core.domain.errors import NotFoundError
from core.domain.ids import first_id_at, new_id
from core.domain.jobs import pool_name
from core.domain.leases import Lease
from core.domain.scheduling import FairnessTerms
from core.services import attempts, charges
from core.services.events import list_events
from core.services.job_rows import BATCH_ROWS
from core.services.promises import check_rows
from core.services.retention import Kind, forget_some
from core.services.usage import UsageGroup, UsagePeriod, UsageTotal, sum_usage
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from schedule.forgetter import forget
from schedule.purger import purge
from schedule.sweeper import sweep
from tests.integration.conftest import BASE_MODEL, Database, Tenant
from tests.integration.test_attempts import claim, queue_job
from tests.integration.test_leadership import schedule_process
from tests.integration.test_sweeper import age_jobs, finish, keys
from tests.waiting import wait_until

DAY = dt.timedelta(days=1)
POOL = pool_name(BASE_MODEL, None)
HISTORY = (Kind.LOG_LINES, Kind.EVENTS, Kind.METRICS)
# A job that ended so many days ago, with its attempt and booking, and so many events, log lines and metrics.
PLANT = """
with made as (
    insert into jobs (id, tenant_id, base_model_id, pool, training_file_id, spec, total_steps, status, error, finished_at,
        swept_at, created_at)
    select gen_random_uuid(), :tenant, :base, :pool, :file, '{}', 1, 'failed', '{"code": "x", "message": "x"}',
        now() - make_interval(days => :days, secs => n), now(), now() - make_interval(days => :days)
    from generate_series(1, :num_jobs) n returning id, finished_at
), tried as (
    insert into attempts (id, tenant_id, job_id, number, lease_token, worker_name, entry_charge_seconds, outcome,
        started_at, ended_at)
    select gen_random_uuid(), :tenant, id, 1, nextval('lease_tokens'), 'w', 0, 'failed', finished_at, finished_at from made
    returning id, ended_at
), booked as (
    insert into usage (id, tenant_id, attempt_id, gpu_seconds, trained_tokens, created_at)
    select gen_random_uuid(), :tenant, id, 1, 1, ended_at from tried
), told as (
    insert into events (id, tenant_id, job_id, level, type, message)
    select gen_random_uuid(), :tenant, id, 'info', 'message', 'x' from made, generate_series(1, :num_rows)
), logged as (
    insert into log_lines (id, tenant_id, job_id, attempt_number, level, name, details)
    select gen_random_uuid(), :tenant, id, 1, 'info', 'x', '{}' from made, generate_series(1, :num_rows)
)
insert into metrics (tenant_id, job_id, step, lease_token, train_loss, train_accuracy, learning_rate, grad_norm, num_tokens,
    created_at)
select :tenant, id, n, 1, 1, 1, 1, 1, 1, finished_at from made, generate_series(1, :num_rows) n
"""


def plant(owner: Engine, tenant: Tenant, *, days: int, num_jobs: int = 1, num_rows: int = 1) -> None:
    """Add jobs past the triggers, which would take as long again."""
    file_id = queue_job(owner, tenant).training_file_id
    values = {"tenant": tenant.id, "file": file_id, "base": BASE_MODEL, "pool": POOL}
    with service_transaction(owner) as session:
        session.execute(text("set local session_replication_role = replica"))
        session.execute(text(PLANT), values | {"days": days, "num_jobs": num_jobs, "num_rows": num_rows})


def run_all(engine: Engine, kind: Kind, *, days: int) -> list[Counter[str]]:
    """Do all that is due, and return what each transaction has deleted."""
    deleted = []
    while True:
        with service_transaction(engine) as session:
            batch = forget_some(session, kind, days=days)
        deleted.append(batch.num_rows)
        if not batch.has_more:
            return deleted


def count(owner: Engine, table: str, tenant: Tenant) -> int:
    with service_transaction(owner) as session:
        query = text(f"select count(*) from {table} where tenant_id = :id")
        return session.scalars(query, {"id": tenant.id}).one()


def sequential_reads(owner: Engine) -> dict[str, int]:
    """Return how often each large table was read as a whole. A session says so at the latest when it is closed."""
    owner.dispose()
    others = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    wait_until(lambda: run_query(owner, f"{others} and backend_type = 'client backend'") == [(0,)])
    rows = run_query(owner, "select relname, seq_scan from pg_stat_user_tables where n_live_tup > 2000")
    return {row.relname: row.seq_scan for row in rows}


def run_query(owner: Engine, query: str) -> Sequence[Row[Any]]:
    with service_transaction(owner) as session:
        return session.execute(text(query)).all()


def test_three_hundred_thousand_old_events_go_a_thousand_at_a_time_without_reading_a_table_and_the_rest_stays(
    schedule: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    plant(owner, tenant, days=400, num_jobs=200, num_rows=1500)
    plant(owner, other_tenant, days=10, num_jobs=2300, num_rows=1)
    run_statements(owner, "analyze")
    before = sequential_reads(owner)
    assert {"events", "log_lines", "metrics", "jobs"} <= set(before)
    for kind in HISTORY:
        deleted = run_all(schedule, kind, days=365)
        assert sum(each[kind] for each in deleted) == 300_000
        assert max(each.total() for each in deleted) == BATCH_ROWS
        assert len(deleted) <= 302
    deleted = run_all(schedule, Kind.JOBS, days=365)
    assert sum(each["jobs"] for each in deleted) == 200
    assert len(deleted) <= 4
    schedule.dispose()
    after = sequential_reads(owner)
    assert {name: num - before[name] for name, num in after.items() if name in before and num > before[name]} == {}
    for table in (*HISTORY, "attempts"):
        assert count(owner, table, tenant) == (1 if table == "events" else 0), "the live job's one event stays"
        assert count(owner, table, other_tenant) == 2300 + (table == "events")
    assert count(owner, "usage", tenant) == 200
    assert count(owner, "jobs", tenant) == 1


def run_statements(owner: Engine, *statements: str) -> None:
    with service_transaction(owner) as session:
        for statement in statements:
            session.execute(text(statement))


def test_a_kind_that_is_done_costs_the_same_however_much_was_done_before(
    schedule: Engine, owner: Engine, tenant: Tenant
) -> None:
    plant(owner, tenant, days=400, num_jobs=1000)
    assert len(run_all(schedule, Kind.EVENTS, days=365)) == 11
    assert [each.total() for each in run_all(schedule, Kind.EVENTS, days=365)] == [0]
    plant(owner, tenant, days=399)
    assert [each.total() for each in run_all(schedule, Kind.EVENTS, days=365)] == [1, 0]


def end_job(worker: Engine, owner: Engine, store: S3ObjectStore, tenant: Tenant) -> Lease:
    """Let a job succeed, and book its use."""
    queue_job(owner, tenant)
    lease = claim(worker)
    assert lease is not None
    finish(worker, store, lease)
    with service_transaction(worker) as session:
        charges.record_usage(session, lease.token, gpu_seconds=5, trained_tokens=7)
    return lease


def fail_job(worker: Engine, owner: Engine, tenant: Tenant) -> Lease:
    queue_job(owner, tenant)
    lease = claim(worker)
    assert lease is not None
    with service_transaction(worker) as session:
        attempts.fail_attempt(session, lease, code="diverged", message="It diverged.", is_job_fault=True)
        charges.record_usage(session, lease.token, gpu_seconds=3, trained_tokens=0)
    return lease


def age_all(owner: Engine, days: int) -> None:
    """Let everything have happened so many days ago."""
    run_statements(
        owner,
        *(
            f"update {table} set {column} = {column} - interval '{days} days'"
            for table, column in (
                ("attempts", "started_at"),
                ("attempts", "ended_at"),
                ("adapters", "created_at"),
                ("jobs", "started_at"),
            )
        ),
    )
    age_jobs(owner, days)


def delete_models(owner: Engine, lease: Lease) -> None:
    for table in ("adapters", "checkpoints"):
        run_statements(owner, f"update {table} set deleted_at = now() where job_id = '{lease.job_id}'")


def used_by_pool(owner: Engine) -> list[UsageTotal]:
    today = dt.datetime.now(dt.UTC).date()
    with service_transaction(owner) as session:
        return list(sum_usage(session, UsagePeriod(today - 30 * DAY, today), group=UsageGroup.POOL, limit=10).items)


def jobs_left(owner: Engine) -> set[uuid.UUID]:
    with service_transaction(owner) as session:
        return set(session.scalars(select(Job.id)).all())


def find_broken(owner: Engine) -> list[str]:
    with service_transaction(owner) as session:
        return [broken for finding in check_rows(session, FairnessTerms()) for broken in finding.broken]


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


def test_the_schedule_can_delete_only_what_belongs_to_jobs_that_are_long_over(
    schedule: Engine, owner: Engine, tenant: Tenant
) -> None:
    plant(owner, tenant, days=0)  # beside the live job
    plant(owner, tenant, days=2)
    with pytest.raises(IntegrityError, match="names_its_job"), service_transaction(schedule) as session:
        session.execute(text("delete from attempts"))
    run_statements(owner, "update usage u set job_id = a.job_id, pool = 'p' from attempts a where a.id = u.attempt_id")
    with service_transaction(schedule) as session:
        for table in ("events", "log_lines", "metrics", "attempts", "jobs"):
            changed = session.connection().execute(text(f"delete from {table}"))
            assert changed.rowcount == 1, table
        assert session.connection().execute(text("delete from files")).rowcount == 0, "they are nobody's garbage"
    assert count(owner, "jobs", tenant) == 3
    for forbidden in ("delete from usage", "delete from audit_entries", "delete from tenants"):
        with pytest.raises(ProgrammingError, match="permission denied"), service_transaction(schedule) as session:
            session.execute(text(forbidden))


def test_no_entry_of_the_audit_log_that_is_younger_than_ninety_days_can_be_deleted(
    schedule: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    with owner_transaction(owner, actor="test") as session:
        session.execute(text("update tenants set name = 'x' where id = :id"), {"id": tenant.id})
    num_entries = count(owner, "audit_entries", tenant)
    assert num_entries > 1
    plant_entries = "insert into audit_entries (tenant_id, actor, action, subject, before, after, created_at) select "
    plant_entries += "'{}', 'a', 'b', 'c', '{{}}', '{{}}', now() - interval '100 days' from generate_series(1, 1500)"
    run_statements(owner, "delete from audit_entries where action = 'b'", plant_entries.format(tenant.id))
    run_statements(owner, "update audit_entries set created_at = now() - interval '89 days' where action <> 'b'")
    # Those that stay have the lowest numbers: they hold up no batch, but are looked at in each.
    run_statements(
        owner,
        "alter table audit_entries alter column number set generated by default",
        "update audit_entries set number = number + 100000 where action <> 'b'",
    )
    assert run_all(schedule, Kind.AUDIT_ENTRIES, days=1000)[0].total() == 0
    deleted = run_all(schedule, Kind.AUDIT_ENTRIES, days=1)
    assert [each.total() for each in deleted] == [1000, 500]
    assert count(owner, "audit_entries", tenant) == num_entries
    with pytest.raises(ProgrammingError, match="permission denied"), service_transaction(worker) as session:
        forget_some(session, Kind.AUDIT_ENTRIES, days=1)


def test_a_cursor_that_points_at_a_deleted_event_is_unknown_and_the_list_is_empty(
    schedule: Engine, owner: Engine, tenant: Tenant
) -> None:
    plant(owner, tenant, days=400, num_rows=3)
    with service_transaction(owner) as session:
        job_id = session.scalars(select(Job.id).where(Job.finished_at.is_not(None))).one()
        page = list_events(session, tenant.id, job_id=job_id, after=None, limit=2)
    run_all(schedule, Kind.EVENTS, days=365)
    with service_transaction(owner) as session:
        with pytest.raises(NotFoundError):
            list_events(session, tenant.id, job_id=job_id, after=page.items[-1].id, limit=2)
        assert list_events(session, tenant.id, job_id=job_id, after=None, limit=2).items == ()


def test_old_uploads_go_with_their_parts_once_their_objects_are_gone(
    schedule: Engine, owner: Engine, tenant: Tenant
) -> None:
    def add_upload(days: int, *, is_purged: bool, num_parts: int) -> uuid.UUID:
        at = dt.datetime.now(dt.UTC) - days * DAY
        upload_id = uuid.UUID(int=first_id_at(at).int + new_id().int % 2**64)
        values = {"id": upload_id, "tenant": tenant.id, "purged": at if is_purged else None, "num": num_parts}
        with service_transaction(owner) as session:
            session.execute(
                text("""
                insert into uploads (id, tenant_id, filename, purpose, mime_type, size_bytes, status, expires_at, purged_at)
                values (:id, :tenant, 'f', 'fine-tune', 'x', 1, 'cancelled', now(), :purged)"""),
                values,
            )
            session.execute(
                text("""
                insert into upload_parts (id, tenant_id, upload_id, object_key, size_bytes)
                select gen_random_uuid(), :tenant, :id, 'k', 1 from generate_series(1, :num)"""),
                values,
            )
        return upload_id

    add_upload(31, is_purged=True, num_parts=1500)
    unpurged = add_upload(31, is_purged=False, num_parts=1)
    young = add_upload(29, is_purged=True, num_parts=1)
    deleted = run_all(schedule, Kind.UPLOADS, days=30)
    assert [each["upload_parts"] for each in deleted] == [1000, 500, 0]
    with service_transaction(owner) as session:
        assert set(session.scalars(text("select id from uploads")).all()) == {unpurged, young}
    assert count(owner, "upload_parts", tenant) == 2


def test_the_row_of_a_deleted_file_goes_once_no_job_names_it(schedule: Engine, owner: Engine, tenant: Tenant) -> None:
    live = queue_job(owner, tenant).training_file_id
    named, old, young, unpurged, result = (queue_job(owner, tenant).training_file_id for _ in range(5))
    purge = "update files set deleted_at = now(), purged_at = now() - make_interval(days => {}) where id = '{}'"
    ages = {named: 31, old: 31, young: 29, result: 31}
    run_statements(owner, *(purge.format(days, file_id) for file_id, days in ages.items()))
    forget_name = f"update jobs set training_file_id = '{live}' where training_file_id = '{{}}'"
    run_statements(owner, *(forget_name.format(each) for each in (old, young, unpurged, result)))
    run_statements(owner, f"update jobs set result_file_id = '{result}' where training_file_id = '{named}'")

    def left() -> set[uuid.UUID]:
        with service_transaction(owner) as session:
            return set(session.scalars(text("select id from files")).all())

    assert [each.total() for each in run_all(schedule, Kind.FILES, days=30)] == [1]
    assert left() == {live, named, young, unpurged, result}
    run_statements(owner, "update jobs set result_file_id = null", forget_name.format(named))
    assert [each.total() for each in run_all(schedule, Kind.FILES, days=30)] == [2]
    assert left() == {live, young, unpurged}


def test_the_schedule_that_leads_deletes_what_its_settings_say_and_zero_days_are_for_ever(
    database: Database, servers: ServerAddresses, owner: Engine, tenant: Tenant
) -> None:
    run_statements(owner, "truncate retention_marks, leaders")
    plant(owner, tenant, days=5, num_rows=3)
    settings = {"keep_events_days": "4", "keep_log_lines_days": "6", "keep_metrics_days": "0"}
    with schedule_process(database, servers, forget_interval_seconds="0.1", **settings):
        wait_until(lambda: count(owner, "events", tenant) == 1)
        plant(owner, tenant, days=5, num_rows=3)
        wait_until(lambda: count(owner, "events", tenant) == 2)
    assert (count(owner, "log_lines", tenant), count(owner, "metrics", tenant)) == (6, 6)


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
