"""Old histories are deleted a thousand rows at a time, and nothing young can be deleted."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import IntegrityError, ProgrammingError

from core.db.models import Job
from core.db.session import owner_transaction, service_transaction
from core.domain.errors import NotFoundError
from core.services.events import list_events
from core.services.job_rows import BATCH_ROWS
from core.services.retention import Kind, forget_some
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.tenants import Tenant
from tests.integration.retention.ageing import count, plant, run_all, run_query, run_statements
from tests.processes import schedule_process
from tests.sessions import any_role_transaction
from tests.waiting import wait_until

HISTORY = (Kind.LOG_LINES, Kind.EVENTS, Kind.METRICS)


def sequential_reads(owner: Engine) -> dict[str, int]:
    """Return how often each large table was read as a whole. A session says so at the latest when it is closed."""
    owner.dispose()
    others = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    wait_until(lambda: run_query(owner, f"{others} and backend_type = 'client backend'") == [(0,)])
    rows = run_query(owner, "select relname, seq_scan from pg_stat_user_tables where n_live_tup > 2000")
    return {row.relname: row.seq_scan for row in rows}


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


def test_a_kind_that_is_done_costs_the_same_however_much_was_done_before(
    schedule: Engine, owner: Engine, tenant: Tenant
) -> None:
    plant(owner, tenant, days=400, num_jobs=1000)
    assert len(run_all(schedule, Kind.EVENTS, days=365)) == 11
    assert [each.total() for each in run_all(schedule, Kind.EVENTS, days=365)] == [0]
    plant(owner, tenant, days=399)
    assert [each.total() for each in run_all(schedule, Kind.EVENTS, days=365)] == [1, 0]


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
    with any_role_transaction(owner) as session:
        job_id = session.scalars(select(Job.id).where(Job.finished_at.is_not(None))).one()
        page = list_events(session, tenant.id, job_id=job_id, after=None, limit=2)
    run_all(schedule, Kind.EVENTS, days=365)
    with any_role_transaction(owner) as session:
        with pytest.raises(NotFoundError):
            list_events(session, tenant.id, job_id=job_id, after=page.items[-1].id, limit=2)
        assert list_events(session, tenant.id, job_id=job_id, after=None, limit=2).items == ()


def test_the_schedule_that_leads_deletes_what_its_settings_say_and_zero_days_are_for_ever(
    database: Database, servers: ServerAddresses, owner: Engine, tenant: Tenant
) -> None:
    run_statements(owner, "truncate retention_marks, leaders")
    plant(owner, tenant, days=5, num_rows=3)
    settings: dict[str, Any] = {"keep_events_days": "4", "keep_log_lines_days": "6", "keep_metrics_days": "0"}
    with schedule_process(database, servers, forget_interval_seconds="0.1", **settings):
        wait_until(lambda: count(owner, "events", tenant) == 1)
        plant(owner, tenant, days=5, num_rows=3)
        wait_until(lambda: count(owner, "events", tenant) == 2)
    assert (count(owner, "log_lines", tenant), count(owner, "metrics", tenant)) == (6, 6)
