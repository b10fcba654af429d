"""What is kept for a time only. Each call deletes about BATCH_ROWS rows at most, by job, and may be made twice.

Jobs are gone through in the order in which they ended. A mark says how far each kind has come, so that a call costs
the same however many jobs ended before. What tenants have made is never deleted here: a job stays, with its attempts,
for as long as its adapter or a checkpoint of it does. Bookings of usage stay for ever.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import CursorResult, Row, TextClause, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.db.models import RetentionMark
from core.domain.duties import Duty
from core.domain.ids import first_id_at
from core.services.set_asides import setting_aside

BATCH_ROWS = 1000
_BATCH_JOBS = 100
_BEGINNING = {"finished_at": dt.datetime.fromtimestamp(0, dt.UTC), "job": uuid.UUID(int=0)}


class Kind(StrEnum):
    """What is deleted by its age, in the order in which it is done."""

    LOG_LINES = "log_lines"
    EVENTS = "events"
    METRICS = "metrics"
    CHECKPOINTS = "checkpoints"
    JOBS = "jobs"
    UPLOADS = "uploads"
    AUDIT_ENTRIES = "audit_entries"


@dataclass(frozen=True)
class Batch:
    """How many rows went, by table, and whether there may be more to do."""

    num_rows: Counter[str]
    has_more: bool


# Rows are found by their job's index and deleted where they lie; none of these reads a table.
_DELETE_SOME = """
delete from {table} where ctid = any(array(
    select ctid from {table} where tenant_id = :tenant and job_id = :job limit :most))
"""
_HISTORY = {kind: text(_DELETE_SOME.format(table=kind)) for kind in (Kind.LOG_LINES, Kind.EVENTS, Kind.METRICS)}
# The purge deletes their objects.
_GIVE_UP_CHECKPOINTS = text("""
update checkpoints set deleted_at = now() where id = any(array(
    select id from checkpoints where tenant_id = :tenant and job_id = :job and deleted_at is null limit :most))
""")
_OF_JOBS: dict[Kind, TextClause] = _HISTORY | {Kind.CHECKPOINTS: _GIVE_UP_CHECKPOINTS}
_NEXT_JOBS = """
select id, tenant_id, finished_at, swept_at from jobs
where (finished_at, id) > (:finished_at, :job) and finished_at < now() - make_interval(days => :days)
order by finished_at, id limit :num
"""
_NEXT = text(_NEXT_JOBS)
# A job is spent when its prefix is swept, all of its attempts are booked and all that it has made is gone. The
# subqueries have a limit, because PostgreSQL might answer an EXISTS in this place by reading the whole table.
_NEXT_SPENT = text(f"""
with walked as ({_NEXT_JOBS})
select w.id, w.tenant_id, w.finished_at, w.swept_at is not null and coalesce(
    (select true from adapters a where a.job_id = w.id and a.purged_at is null limit 1),
    (select true from checkpoints c where c.job_id = w.id and c.purged_at is null limit 1),
    (select true from resume_points r where r.job_id = w.id limit 1),
    (select true from attempts a left join usage u on u.attempt_id = a.id
        where a.job_id = w.id and u.id is null limit 1),
    (select true from set_asides s where s.duty = 'forget' and s.row_id = w.id and s.retry_at > now() limit 1)
) is null as is_spent
from walked w order by w.finished_at, w.id
""")  # noqa: S608 (of constants)
# Before a job goes: its result file does, and its bookings take on what they need of it.
_LET_GO = (
    text("""
    update files set deleted_at = now() where deleted_at is null
      and id = (select result_file_id from jobs where id = :job)
    """),
    text("""
    update usage u set job_id = j.id, pool = j.pool from attempts a join jobs j on j.id = a.job_id
    where a.job_id = :job and u.attempt_id = a.id
    """),
)
# These stand and fall together, or the check of the contract would see a success without its adapter.
_DELETE_JOB = {
    "checkpoints": text("delete from checkpoints where job_id = :job"),
    "adapters": text("delete from adapters where job_id = :job"),
    "attempts": text("delete from attempts where job_id = :job"),
    "jobs": text("delete from jobs where id = :job"),
}
# Ids are in the order of time, so that those to delete are the first.
_OLD_UPLOADS = text("""
select id, tenant_id from uploads
where id < :before and purged_at < now() - make_interval(days => :days) order by id limit :num
""")
_DELETE_PARTS = text("""
delete from upload_parts where ctid = any(array(
    select ctid from upload_parts where tenant_id = :tenant and upload_id = :upload limit :most))
""")
_DELETE_UPLOAD = text("delete from uploads where id = :upload")
_FORGET_AUDIT_ENTRIES = text("select forget_audit_entries(make_interval(days => :days), :most)")


def forget_some(session: Session, kind: Kind, *, days: int) -> Batch:
    """Delete some of what is older than so many days."""
    match kind:
        case Kind.JOBS:
            return _forget_jobs(session, days)
        case Kind.UPLOADS:
            return _forget_uploads(session, days)
        case Kind.AUDIT_ENTRIES:
            num_rows = session.scalars(_FORGET_AUDIT_ENTRIES, {"days": days, "most": BATCH_ROWS}).one()
            return Batch(Counter({kind: num_rows}), has_more=num_rows == BATCH_ROWS)
        case _:
            return _forget_of_jobs(session, kind, days)


def _forget_of_jobs(session: Session, kind: Kind, days: int) -> Batch:
    jobs, last, left = _next_jobs(session, kind, _NEXT, days), None, BATCH_ROWS
    for job in jobs:
        left -= _run(session, _OF_JOBS[kind], tenant=job.tenant_id, job=job.id, most=left)
        if not left:
            break  # the job may have more
        last = job
    _move_mark(session, kind, last)
    return Batch(Counter({kind: BATCH_ROWS - left}), has_more=bool(jobs))


def _forget_jobs(session: Session, days: int) -> Batch:
    """Delete spent jobs. Those that were passed over may be spent later, so behind the last it begins anew."""
    jobs, last = _next_jobs(session, Kind.JOBS, _NEXT_SPENT, days), None
    num_rows: Counter[str] = Counter()
    for job in jobs:
        if job.is_spent:
            num_rows += _delete_history(session, job, most=BATCH_ROWS - num_rows.total())
            if num_rows.total() >= BATCH_ROWS:
                break  # the job may have more
            with setting_aside(session, Duty.FORGET, row_id=job.id, tenant_id=job.tenant_id):
                num_rows += _delete_job(session, job)
        last = job
    has_more = bool(jobs) and (last is not jobs[-1] or len(jobs) == _BATCH_JOBS)
    _move_mark(session, Kind.JOBS, last, is_at_end=not has_more)
    return Batch(num_rows, has_more)


def _delete_history(session: Session, job: Row[Any], *, most: int) -> Counter[str]:
    num_rows: Counter[str] = Counter()
    for kind, statement in _HISTORY.items():
        left = most - num_rows.total()
        num_rows[kind] = _run(session, statement, tenant=job.tenant_id, job=job.id, most=left)
    return num_rows


def _delete_job(session: Session, job: Row[Any]) -> Counter[str]:
    for statement in _LET_GO:
        session.execute(statement, {"job": job.id})
    return Counter({table: _run(session, statement, job=job.id) for table, statement in _DELETE_JOB.items()})


def _forget_uploads(session: Session, days: int) -> Batch:
    before = first_id_at(dt.datetime.now(dt.UTC) - dt.timedelta(days=days))
    uploads = session.execute(_OLD_UPLOADS, {"before": before, "days": days, "num": _BATCH_JOBS}).all()
    num_rows: Counter[str] = Counter()
    for upload in uploads:
        most = BATCH_ROWS - num_rows.total()
        num_rows["upload_parts"] += _run(session, _DELETE_PARTS, tenant=upload.tenant_id, upload=upload.id, most=most)
        if num_rows.total() >= BATCH_ROWS:
            break  # the upload may have more
        num_rows[Kind.UPLOADS] += _run(session, _DELETE_UPLOAD, upload=upload.id)
    return Batch(num_rows, has_more=bool(uploads))


def _next_jobs(session: Session, kind: Kind, query: TextClause, days: int) -> Sequence[Row[Any]]:
    mark = session.get(RetentionMark, kind)
    since = {"finished_at": mark.finished_at, "job": mark.job_id} if mark else _BEGINNING
    return session.execute(query, since | {"days": days, "num": _BATCH_JOBS}).all()


def _move_mark(session: Session, kind: Kind, job: Row[Any] | None, *, is_at_end: bool = False) -> None:
    if job is None and not is_at_end:
        return
    place = _BEGINNING if is_at_end or job is None else {"finished_at": job.finished_at, "job": job.id}
    values = {"finished_at": place["finished_at"], "job_id": place["job"]}
    statement = insert(RetentionMark).values(kind=kind, **values)
    session.execute(statement.on_conflict_do_update(index_elements=["kind"], set_=values))


def _run(session: Session, statement: TextClause, **values: Any) -> int:
    """Run a statement and return how many rows it changed."""
    changed: CursorResult[Any] = session.connection().execute(statement, values)
    return changed.rowcount
