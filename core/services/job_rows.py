"""Deletes a whole job: first its history in batches, then its row with its attempts and artifacts."""

from __future__ import annotations

import uuid
from collections import Counter
from typing import Any

from sqlalchemy import CursorResult, TextClause, text

from core.db.session import ServiceSession

# The approximate number of rows that one transaction deletes.
BATCH_ROWS = 1000
# The inner query finds the addresses (`ctid`) of one batch by the index on the job, and the outer one deletes them
# there. None of these statements scans a table.
_DELETE_SOME = """
delete from {table} where ctid = any(array(
    select ctid from {table} where tenant_id = :tenant and job_id = :job limit :most))
"""
HISTORY = {table: text(_DELETE_SOME.format(table=table)) for table in ("log_lines", "events", "metrics")}
# A job `w` is spent when its prefix is swept, all of its attempts are booked and all of its artifacts are purged. Each
# subquery has a limit of 1 instead of an EXISTS: for an EXISTS here PostgreSQL might read the whole table.
IS_SPENT = """
w.swept_at is not null and coalesce(
    (select true from adapters a where a.job_id = w.id and a.purged_at is null limit 1),
    (select true from checkpoints c where c.job_id = w.id and c.purged_at is null limit 1),
    (select true from resume_points r where r.job_id = w.id limit 1),
    (select true from attempts a left join usage u on u.attempt_id = a.id
        where a.job_id = w.id and u.id is null limit 1)
) is null
"""
IS_IN_REACH = """
(select true from set_asides s where s.duty = '{duty}' and s.row_id = w.id and s.retry_at > now() limit 1) is null
"""
# Before the job's row is deleted, its result file is marked as deleted, and its bookings of usage copy the job's id and
# pool, which they would otherwise read from the job.
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
# All in one transaction: otherwise the check of the promises could see a success without its adapter.
_DELETE_JOB = {
    "checkpoints": text("delete from checkpoints where job_id = :job"),
    "adapters": text("delete from adapters where job_id = :job"),
    "attempts": text("delete from attempts where job_id = :job"),
    "jobs": text("delete from jobs where id = :job"),
}


def delete_history(session: ServiceSession, job_id: uuid.UUID, tenant_id: uuid.UUID, *, most: int) -> Counter[str]:
    """Delete at most this many of a job's events, log lines and observations. Return how many of each."""
    num_rows: Counter[str] = Counter()
    for table, statement in HISTORY.items():
        left = most - num_rows.total()
        num_rows[table] = run(session, statement, tenant=tenant_id, job=job_id, most=left)
    return num_rows


def delete_job_row(session: ServiceSession, job_id: uuid.UUID) -> Counter[str]:
    """Delete a spent job without history. Return how many rows of each table that were."""
    for statement in _LET_GO:
        session.execute(statement, {"job": job_id})
    return Counter({table: run(session, statement, job=job_id) for table, statement in _DELETE_JOB.items()})


def run(session: ServiceSession, statement: TextClause, **values: Any) -> int:
    """Run a statement and return how many rows it changed."""
    changed: CursorResult[Any] = session.connection().execute(statement, values)
    return changed.rowcount
