"""Deletes what is kept for a limited time. Each call deletes about BATCH_ROWS rows at most and may be repeated.

| kind | the age counts from | when it goes |
|---|---|---|
| log lines, events, observations | the job's end | when it is old enough |
| checkpoints | the job's end | they are marked as deleted, and the purge deletes their objects |
| jobs | the job's end | when nothing that the job made is left (`IS_SPENT`) |
| uploads | the purge of the parts | when it is old enough |
| files | the purge of the object | when no job and no upload names the file |
| audit entries | the entry | when it is old enough |

Jobs are walked in the order in which they ended. A mark for each kind stores how far the walk has come, so a call costs
the same however many jobs ended before. A job with an adapter or a checkpoint stays, with its attempts. Bookings of
usage stay for ever.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Row, TextClause, text

from core.db.session import ServiceSession
from core.domain.duties import Duty
from core.domain.ids import first_id_at
from core.services.job_rows import BATCH_ROWS, HISTORY, IS_IN_REACH, IS_SPENT, delete_history, delete_job_row, run
from core.services.marks import BEGINNING, find_mark, move_mark
from core.services.set_asides import setting_aside

_BATCH_WALKED = 100


class Kind(StrEnum):
    """What is deleted by its age, in the order of deletion."""

    LOG_LINES = "log_lines"
    EVENTS = "events"
    METRICS = "metrics"
    CHECKPOINTS = "checkpoints"
    JOBS = "jobs"
    UPLOADS = "uploads"
    FILES = "files"
    AUDIT_ENTRIES = "audit_entries"


@dataclass(frozen=True)
class Batch:
    """How many rows of each table were deleted, and whether there may be more."""

    num_rows: Counter[str]
    has_more: bool


# The purge deletes their objects.
_GIVE_UP_CHECKPOINTS = text("""
update checkpoints set deleted_at = now() where id = any(array(
    select id from checkpoints where tenant_id = :tenant and job_id = :job and deleted_at is null limit :most))
""")
_OF_JOBS: dict[Kind, TextClause] = {Kind(table): statement for table, statement in HISTORY.items()} | {
    Kind.CHECKPOINTS: _GIVE_UP_CHECKPOINTS
}
# One batch behind the mark, read from the index on (finished_at, id). `walked` bounds the batch first, so that the
# tests of `is_spent` run for these rows only.
_NEXT_JOBS = """
select id, tenant_id, finished_at, swept_at from jobs
where (finished_at, id) > (:finished_at, :job) and finished_at < now() - make_interval(days => :days)
order by finished_at, id limit :num
"""
_NEXT = text(_NEXT_JOBS)
_NEXT_SPENT = text(f"""
with walked as ({_NEXT_JOBS})
select w.id, w.tenant_id, w.finished_at, w.swept_at, {IS_SPENT} and {IS_IN_REACH.format(duty=Duty.FORGET)} as is_spent
from walked w order by w.finished_at, w.id
""")  # noqa: S608 (of constants)
# Deleted files, in the order in which their objects were purged. A file is spent when no job or upload names it.
_NEXT_FILES = text("""
with walked as (
    select f.id, f.purged_at from files f
    where (f.purged_at, f.id) > (:finished_at, :job) and f.purged_at < now() - make_interval(days => :days)
    order by f.purged_at, f.id limit :num
)
select w.id, w.purged_at as finished_at, coalesce(
    (select true from jobs j where j.training_file_id = w.id limit 1),
    (select true from jobs j where j.validation_file_id = w.id limit 1),
    (select true from jobs j where j.result_file_id = w.id limit 1),
    (select true from uploads u where u.file_id = w.id limit 1)) is null as is_spent
from walked w order by w.purged_at, w.id
""")
_DELETE_FILE = text("delete from files where id = :file")
# Ids sort by time, so the oldest uploads come first in the primary key.
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


def forget_some(session: ServiceSession, kind: Kind, *, days: int) -> Batch:
    """Delete some rows that are older than this many days."""
    match kind:
        case Kind.JOBS:
            return _forget_jobs(session, days)
        case Kind.UPLOADS:
            return _forget_uploads(session, days)
        case Kind.FILES:
            return _forget_files(session, days)
        case Kind.AUDIT_ENTRIES:
            num_rows = session.scalars(_FORGET_AUDIT_ENTRIES, {"days": days, "most": BATCH_ROWS}).one()
            return Batch(Counter({kind: num_rows}), has_more=num_rows == BATCH_ROWS)
        case _:
            return _forget_of_jobs(session, kind, days)


def _forget_of_jobs(session: ServiceSession, kind: Kind, days: int) -> Batch:
    jobs, last, left = _next_rows(session, kind, _NEXT, days), None, BATCH_ROWS
    for job in jobs:
        left -= run(session, _OF_JOBS[kind], tenant=job.tenant_id, job=job.id, most=left)
        if not left:
            break  # the job may have more
        last = job
    _move_mark(session, kind, last)
    return Batch(Counter({kind: BATCH_ROWS - left}), has_more=bool(jobs))


def _forget_jobs(session: ServiceSession, days: int) -> Batch:
    """Delete spent jobs. At the end the walk starts again, because jobs that were skipped may be spent later."""
    jobs, last = _next_rows(session, Kind.JOBS, _NEXT_SPENT, days), None
    num_rows: Counter[str] = Counter()
    for job in jobs:
        if job.is_spent:
            num_rows += delete_history(session, job.id, job.tenant_id, most=BATCH_ROWS - num_rows.total())
            if num_rows.total() >= BATCH_ROWS:
                break  # the job may have more
            with setting_aside(session, Duty.FORGET, row_id=job.id, tenant_id=job.tenant_id):
                num_rows += delete_job_row(session, job.id)
        last = job
    has_more = bool(jobs) and (last is not jobs[-1] or len(jobs) == _BATCH_WALKED)
    _move_mark(session, Kind.JOBS, last, is_at_end=not has_more)
    return Batch(num_rows, has_more)


def _forget_uploads(session: ServiceSession, days: int) -> Batch:
    before = first_id_at(dt.datetime.now(dt.UTC) - dt.timedelta(days=days))
    uploads = session.execute(_OLD_UPLOADS, {"before": before, "days": days, "num": _BATCH_WALKED}).all()
    num_rows: Counter[str] = Counter()
    for upload in uploads:
        most = BATCH_ROWS - num_rows.total()
        num_rows["upload_parts"] += run(session, _DELETE_PARTS, tenant=upload.tenant_id, upload=upload.id, most=most)
        if num_rows.total() >= BATCH_ROWS:
            break  # this upload may have more parts
        num_rows[Kind.UPLOADS] += run(session, _DELETE_UPLOAD, upload=upload.id)
    return Batch(num_rows, has_more=bool(uploads))


def _forget_files(session: ServiceSession, days: int) -> Batch:
    """Delete deleted files that no row names. At the end the walk starts again, because others may be free later."""
    files = _next_rows(session, Kind.FILES, _NEXT_FILES, days)
    num_rows = sum(run(session, _DELETE_FILE, file=file.id) for file in files if file.is_spent)
    has_more = len(files) == _BATCH_WALKED
    _move_mark(session, Kind.FILES, files[-1] if files else None, is_at_end=not has_more)
    return Batch(Counter({Kind.FILES: num_rows}), has_more)


def _next_rows(session: ServiceSession, kind: Kind, query: TextClause, days: int) -> Sequence[Row[Any]]:
    mark = find_mark(session, kind)
    since = {"finished_at": mark.finished_at, "job": mark.job_id}
    return session.execute(query, since | {"days": days, "num": _BATCH_WALKED}).all()


def _move_mark(session: ServiceSession, kind: Kind, last: Row[Any] | None, *, is_at_end: bool = False) -> None:
    if is_at_end:
        move_mark(session, kind, to=BEGINNING)
    elif last is not None:
        move_mark(session, kind, to=last.finished_at, row_id=last.id)
