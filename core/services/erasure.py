"""Erases what tenants and operators have deleted, in small transactions. Every call may be repeated.

| what was deleted | at once | later |
|---|---|---|
| a job | its texts, settings and history go, also from the audit log | its row goes once the job is spent |
| a tenant's jobs | they are cancelled | they are deleted, then erased as above |
| a tenant's files and uploads | marked as deleted, and their names removed | they go once their objects are purged |
| a tenant's adapters and checkpoints | they are marked as deleted | they go with their jobs |
| a tenant's API keys and idempotency keys | they go | - |
| a tenant's queues, storage totals and rows set aside | - | they go after its jobs, uploads and files |
| the tenant itself | - | its row stays, because bookings of usage refer to it for ever; its names are removed |

A job is spent when its objects are purged, its use is booked and its prefix is swept. Until then its row keeps ids and
numbers only, because a late worker may still write an object.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, TextClause, func, select, text, update

from core.db.base import Row as TableRow
from core.db.models import Job, Tenant
from core.db.session import ServiceSession
from core.domain.duties import Duty
from core.domain.jobs import UNFINISHED_STATUSES
from core.services.job_rows import BATCH_ROWS, IS_IN_REACH, IS_SPENT, delete_history, delete_job_row, run
from core.services.jobs import cancel_job
from core.services.set_asides import is_in_reach, setting_aside

_BATCH_JOBS = 100


@dataclass(frozen=True)
class Place:
    """The place of a deleted job in the order of deletion."""

    deleted_at: dt.datetime
    job_id: uuid.UUID


BEGINNING = Place(dt.datetime.fromtimestamp(0, dt.UTC), uuid.UUID(int=0))

# `walked` reads one batch from the index `ix_jobs_to_erase`. Only these rows are then tested for being spent.
_NEXT_JOBS = text(f"""
with walked as (
    select id, tenant_id, deleted_at, blanked_at, swept_at, result_file_id from jobs
    where deleted_at is not null and (blanked_at is null or swept_at is not null)
      and (deleted_at, id) > (:deleted_at, :job)
    order by deleted_at, id limit :num
)
select w.*, {IS_IN_REACH.format(duty=Duty.ERASE)} as is_in_reach, blanked_at is not null and {IS_SPENT} and
    (select true from files f where f.id = w.result_file_id and f.purged_at is null limit 1) is null as is_spent
from walked w order by w.deleted_at, w.id
""")  # noqa: S608 (of constants)
# The audit log's entries are blanked first, because they are found through rows that the next statements change.
_BLANK_JOB = tuple(
    map(
        text,
        (
            "select blank_audit_entries_of_job(:job)",
            """update jobs set blanked_at = now(), suffix = null, metadata = '{}', spec = '{}', request_hash = null,
                   datasets = null, traceparent = null, error = case when error is not null then '{}'::jsonb end,
                   fine_tuned_model = case when fine_tuned_model is not null then 'deleted:' || id end
               where id = :job""",
            "update attempts set error = null where job_id = :job and error is not null",
            "update adapters set name = 'deleted:' || id, files = '[]' where job_id = :job",
            """update checkpoints set model_name = 'deleted:' || id, files = '[]', metrics = '{}'
               where job_id = :job""",
            """update files set filename = 'deleted', status_details = null, problems = '[]', report = '{}'
               where id = (select result_file_id from jobs where id = :job)""",
            """delete from checkpoint_permissions
               where checkpoint_id = any(array(select id from checkpoints where job_id = :job))""",
            "delete from set_asides where row_id = :job",
        ),
    )
)
_DELETE_RESULT = text("delete from files where id = :file")


def erase_some_jobs(session: ServiceSession, *, after: Place) -> tuple[Counter[str], Place | None]:
    """Erase some deleted jobs behind a place. Return how many rows went, and the last place, or None at the end."""
    values = {"deleted_at": after.deleted_at, "job": after.job_id, "num": _BATCH_JOBS}
    jobs = session.execute(_NEXT_JOBS, values).all()
    num_rows: Counter[str] = Counter()
    for job in jobs:
        num_rows += delete_history(session, job.id, job.tenant_id, most=BATCH_ROWS - num_rows.total())
        if num_rows.total() >= BATCH_ROWS:
            break  # this job may have more history, so the next call starts with it again
        if job.is_in_reach:
            with setting_aside(session, Duty.ERASE, row_id=job.id, tenant_id=job.tenant_id):
                num_rows += _erase_job(session, job)
        after = Place(job.deleted_at, job.id)
    return num_rows, after if jobs else None


def _erase_job(session: ServiceSession, job: Row[Any]) -> Counter[str]:
    if job.blanked_at is None:
        for statement in _BLANK_JOB:
            session.execute(statement, {"job": job.id})
    if not job.is_spent:
        return Counter()
    num_rows = delete_job_row(session, job.id)
    return num_rows + Counter(files=run(session, _DELETE_RESULT, file=job.result_file_id))


@dataclass(frozen=True)
class _Step:
    """Changes or deletes some of a tenant's rows, once the tables in `waits_for` have none of its rows left."""

    table: str
    statement: TextClause
    waits_for: tuple[str, ...] = ()


# The inner query finds a bounded batch of row addresses (`ctid`) by the tenant's index. The outer statement then reads
# exactly these rows.
_UPDATE_SOME = """
update {table} set {values}
where ctid = any(array(select r.ctid from {table} r where r.tenant_id = :tenant and ({where}) limit :most))
"""
_DELETE_SOME = """
delete from {table}
where ctid = any(array(select r.ctid from {table} r where r.tenant_id = :tenant and ({where}) limit :most))
"""


def _update(table: str, values: str, *, where: str) -> _Step:
    return _Step(table, text(_UPDATE_SOME.format(table=table, values=values, where=where)))


def _delete(table: str, *, where: str = "true", waits_for: tuple[str, ...] = ()) -> _Step:
    return _Step(table, text(_DELETE_SOME.format(table=table, where=where)), waits_for)


# In order. Rows lose their names in the step that marks them as deleted; the purge then deletes their objects. A row is
# deleted only after the rows that refer to it.
_TENANT_STEPS = (
    _update("jobs", "deleted_at = now()", where="finished_at is not null and deleted_at is null"),
    _update("adapters", "deleted_at = now()", where="deleted_at is null"),
    _update("checkpoints", "deleted_at = now()", where="deleted_at is null"),
    _update(
        "files",
        "deleted_at = coalesce(deleted_at, now()), filename = 'deleted', status_details = null, problems = '[]', "
        "report = '{}'",
        where="deleted_at is null or filename <> 'deleted' or status_details is not null or problems <> '[]' "
        "or report <> '{}'",
    ),
    _update(
        "uploads",
        "status = case when file_id is null then 'cancelled' else status end, completing_until = null, "
        "filename = 'deleted', mime_type = 'deleted'",
        where="status in ('pending', 'completing') or filename <> 'deleted' or mime_type <> 'deleted'",
    ),
    _delete("idempotency_keys"),
    _Step("api_keys", text("delete from api_keys where tenant_id = :tenant")),  # all at once: keys refer to each other
    _delete("upload_parts", where="(select u.purged_at from uploads u where u.id = r.upload_id) is not null"),
    _delete("uploads", where="r.purged_at is not null", waits_for=("upload_parts",)),
    _delete("files", where="r.purged_at is not null", waits_for=("jobs", "uploads")),
    *(_delete(table, waits_for=("jobs", "uploads", "files")) for table in ("queues", "storage_totals", "set_asides")),
)
_BLANK_AUDIT_ENTRIES = text("select blank_audit_entries_of_tenant(:tenant, :most)")
# The tables with a foreign key to `tenants`. A tenant's rows elsewhere refer to rows of these.
_ROOTS = sorted(
    name
    for name, table in TableRow.metadata.tables.items()
    if any(key.column.table.name == "tenants" for key in table.foreign_keys)
)
_HAS_ROWS = "(select '{table}' from {table} where tenant_id = :tenant limit 1)"
_LEFT = text(" union all ".join(_HAS_ROWS.format(table=table) for table in (*_ROOTS, "upload_parts")))


def list_deleted_tenants(session: ServiceSession) -> Sequence[uuid.UUID]:
    """Return the tenants that are being erased."""
    being_erased = (Tenant.deleted_at.is_not(None), Tenant.erased_at.is_(None), is_in_reach(Duty.ERASE, Tenant.id))
    return session.scalars(select(Tenant.id).where(*being_erased).order_by(Tenant.deleted_at)).all()


def erase_some_of_tenant(session: ServiceSession, tenant_id: uuid.UUID) -> Counter[str]:
    """Erase some rows of a deleted tenant. Return how many of each table, or nothing if nothing can be done now."""
    num_rows: Counter[str] = Counter()
    with setting_aside(session, Duty.ERASE, row_id=tenant_id, tenant_id=tenant_id) as trial:
        num_rows["jobs"] = _cancel_some(session, tenant_id)
        left = _find_left(session, tenant_id)
        for step in _TENANT_STEPS:
            if left.isdisjoint(step.waits_for):
                most = max(BATCH_ROWS - num_rows.total(), 0)
                num_rows[step.table] += run(session, step.statement, tenant=tenant_id, most=most)
        values = {"tenant": tenant_id, "most": max(BATCH_ROWS - num_rows.total(), 0)}
        num_rows["audit_entries"] = session.scalars(_BLANK_AUDIT_ENTRIES, values).one()
    return +num_rows if trial.is_done else Counter()


def mark_erased(session: ServiceSession, tenant_id: uuid.UUID, *, min_age: dt.timedelta) -> bool:
    """Mark a tenant as erased if nothing is left of it and no late write is possible any more."""
    if _find_left(session, tenant_id):
        return False
    is_due = (Tenant.id == tenant_id, Tenant.erased_at.is_(None), Tenant.deleted_at < func.now() - min_age)
    marked = update(Tenant).where(*is_due).values(erased_at=func.now()).returning(Tenant.id)
    return session.scalar(marked) is not None


def has_rows(session: ServiceSession, tenant_id: uuid.UUID) -> bool:
    return bool(_find_left(session, tenant_id))


def _find_left(session: ServiceSession, tenant_id: uuid.UUID) -> set[str]:
    return set(session.scalars(_LEFT, {"tenant": tenant_id}))


def _cancel_some(session: ServiceSession, tenant_id: uuid.UUID) -> int:
    """Cancel some jobs of a tenant. Their workers learn so at their next heartbeats."""
    unfinished = select(Job.id).where(Job.tenant_id == tenant_id, Job.status.in_(UNFINISHED_STATUSES))
    job_ids = session.scalars(unfinished.limit(_BATCH_JOBS)).all()
    for job_id in job_ids:
        cancel_job(session, tenant_id, job_id=job_id)
    return len(job_ids)
