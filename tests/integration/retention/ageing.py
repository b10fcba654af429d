"""Jobs that ended long ago, and queries for what is left of them."""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Engine, Row, select, text

from core.db.models import Job
from core.db.session import service_transaction
from core.domain.failures import Failure
from core.domain.leases import Lease
from core.domain.scheduling import FairnessTerms
from core.services import attempts, charges
from core.services.promises import check_rows
from core.services.retention import Kind, forget_some
from core.services.usage import UsageGroup, UsagePeriod, UsageTotal, sum_usage
from core.storage import S3ObjectStore
from tests.factories.bases import BASE_MODEL, POOL
from tests.factories.jobs import age_jobs, claim, finish, queue_job
from tests.factories.tenants import Tenant
from tests.sessions import any_role_transaction

DAY = dt.timedelta(days=1)
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
        return int(session.scalars(query, {"id": tenant.id}).one())


def run_query(owner: Engine, query: str) -> Sequence[Row[Any]]:
    with service_transaction(owner) as session:
        return session.execute(text(query)).all()


def run_statements(owner: Engine, *statements: str) -> None:
    with service_transaction(owner) as session:
        for statement in statements:
            session.execute(text(statement))


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
        attempts.fail_attempt(
            session, lease, failure=Failure(code="diverged", message="It diverged."), is_job_fault=True
        )
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
    with any_role_transaction(owner) as session:
        return list(sum_usage(session, UsagePeriod(today - 30 * DAY, today), group=UsageGroup.POOL, limit=10).items)


def jobs_left(owner: Engine) -> set[uuid.UUID]:
    with service_transaction(owner) as session:
        return set(session.scalars(select(Job.id)).all())


def find_broken(owner: Engine) -> list[str]:
    with any_role_transaction(owner) as session:
        return [broken for finding in check_rows(session, FairnessTerms()) for broken in finding.broken]
