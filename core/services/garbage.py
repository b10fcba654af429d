"""Finds objects that no row names: of attempts that did not win, and of uploads whose process died before the commit.

Only jobs and files of a certain age are looked at, so that no late write and no row still to be committed is taken for
garbage. A row that has to go is deleted before its objects. An object that any row still names is never garbage.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select, update

from core.db.models import Adapter, Attempt, Checkpoint, File, Job, ResumePoint, Tenant, Usage
from core.db.session import ServiceSession
from core.domain.duties import Duty
from core.domain.ids import first_id_at
from core.domain.objects import file_id_of, job_prefix
from core.services.charges import record_usage
from core.services.marks import find_mark, move_mark
from core.services.set_asides import is_in_reach, setting_aside

_LIMIT = 100
_SETTLEMENT = "settlement"  # the mark: all attempts that ended before it were looked at
# Attempts that ended this long before the mark are looked at again, because some may have been set aside.
_LOOKED_AT_AGAIN = dt.timedelta(days=7)


@dataclass(frozen=True)
class EndedJob:
    """A job that is over: the prefix of its attempts, and the keys and prefixes below it that rows still name."""

    id: uuid.UUID
    tenant_id: uuid.UUID
    prefix: str
    named: tuple[str, ...]

    def is_garbage(self, object_key: str) -> bool:
        assert object_key.startswith(self.prefix)
        return not any(
            object_key == name or (name.endswith("/") and object_key.startswith(name)) for name in self.named
        )


def find_unswept_jobs(session: ServiceSession, *, min_age: dt.timedelta) -> tuple[EndedJob, ...]:
    """Return some jobs that ended longer ago than `min_age` and whose prefixes have not been swept.

    No attempt resumes from their resume points, so these are deleted first, in the same transaction.
    """
    is_over = (Job.finished_at < func.now() - min_age, Job.swept_at.is_(None), is_in_reach(Duty.SWEEP, Job.id))
    jobs = session.execute(
        select(Job.id, Job.tenant_id, Job.result_file_id).where(*is_over).order_by(Job.finished_at).limit(_LIMIT)
    ).all()
    session.execute(delete(ResumePoint).where(ResumePoint.job_id.in_(job.id for job in jobs)))
    return tuple(
        EndedJob(
            job.id,
            job.tenant_id,
            job_prefix(job.tenant_id, job.id),
            _named_by_rows(session, job.id, job.result_file_id),
        )
        for job in jobs
    )


def mark_swept(session: ServiceSession, job_id: uuid.UUID) -> None:
    session.execute(update(Job).where(Job.id == job_id).values(swept_at=func.now()))


def list_tenant_ids(session: ServiceSession) -> Sequence[uuid.UUID]:
    """Return the tenants whose files are to be swept: all except erased ones."""
    swept = (Tenant.erased_at.is_(None), is_in_reach(Duty.SWEEP, Tenant.id))
    return session.scalars(select(Tenant.id).where(*swept).order_by(Tenant.id)).all()


def find_orphaned_files(
    session: ServiceSession, object_keys: Iterable[str], *, min_age: dt.timedelta
) -> tuple[str, ...]:
    """Return those of these keys that belong to files older than `min_age` without a row."""
    now = session.scalars(select(func.now())).one()
    too_young = first_id_at(now - min_age)
    old = {key: id_ for key in object_keys if (id_ := file_id_of(key)) and id_ < too_young}
    known = set(session.scalars(select(File.id).where(File.id.in_(old.values()))).all())
    return tuple(key for key, file_id in old.items() if file_id not in known)


def settle_usage(session: ServiceSession, *, min_age: dt.timedelta) -> int:
    """Book the charges of some attempts whose workers were lost before they reported. Return for how many.

    It continues where the last call ended, however long ago that was.
    """
    mark = find_mark(session, _SETTLEMENT)
    last = session.scalars(select(func.now() - min_age)).one()
    is_new = Attempt.ended_at.between(mark.finished_at - _LOOKED_AT_AGAIN, last)
    is_booked = select(Usage.id).where(Usage.attempt_id == Attempt.id).exists()
    unbooked = select(Attempt).where(is_new, ~is_booked, is_in_reach(Duty.SETTLE, Attempt.id))
    attempts = session.scalars(unbooked.order_by(Attempt.ended_at).limit(_LIMIT)).all()
    num_settled = 0
    for attempt in attempts:
        with setting_aside(session, Duty.SETTLE, row_id=attempt.id, tenant_id=attempt.tenant_id) as settlement:
            record_usage(session, attempt.lease_token, gpu_seconds=attempt.used_seconds, trained_tokens=0)
        num_settled += settlement.is_done
    if len(attempts) < _LIMIT:
        move_mark(session, _SETTLEMENT, to=last)
    return num_settled


def _named_by_rows(session: ServiceSession, job_id: uuid.UUID, result_file_id: uuid.UUID | None) -> tuple[str, ...]:
    prefixes = [
        *session.scalars(select(Adapter.object_prefix).where(Adapter.job_id == job_id, Adapter.purged_at.is_(None))),
        *session.scalars(
            select(Checkpoint.object_prefix).where(Checkpoint.job_id == job_id, Checkpoint.purged_at.is_(None))
        ),
    ]
    results = session.scalars(select(File.object_key).where(File.id == result_file_id, File.purged_at.is_(None)))
    return (*prefixes, *results)
