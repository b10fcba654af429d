"""Finds rows that were deleted or have expired and whose objects still exist. Deleting an object twice is harmless."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, delete, func, text, update

from core.db.models import Adapter, Checkpoint, File, ResumePoint, Upload
from core.db.session import ServiceSession
from core.domain.objects import upload_prefix

# The number of due rows taken of each tenant at a time. A tenant that deleted a million rows delays the others only by
# this many.
_TURN = 20
_KINDS: dict[str, type[File | Upload | Adapter | Checkpoint]] = {
    "file": File,
    "upload": Upload,
    "adapter": Adapter,
    "checkpoint": Checkpoint,
}
# One lateral query for each tenant, with a limit, so that every tenant gets its turn. Resume points of ended jobs are
# due at once, because no attempt will resume from them.
_DUE = text("""
select due.kind, due.id, t.id as tenant_id, due.location
from tenants t cross join lateral (
    select * from (
        select 'file' as kind, f.id, f.object_key as location from files f
        where f.tenant_id = t.id and f.deleted_at is not null and f.purged_at is null
        union all select 'upload', u.id, null from uploads u
        where u.tenant_id = t.id and u.purged_at is null
          and (u.status in ('completed', 'cancelled') or u.expires_at < now())
        union all select 'adapter', a.id, a.object_prefix from adapters a
        where a.tenant_id = t.id and a.deleted_at is not null and a.purged_at is null
        union all select 'checkpoint', c.id, c.object_prefix from checkpoints c
        where c.tenant_id = t.id and c.deleted_at is not null and c.purged_at is null
        union all select 'resume_point', r.id, r.object_prefix from resume_points r join jobs j on j.id = r.job_id
        where r.tenant_id = t.id and j.finished_at is not null
    ) all_due
    where not exists (
        select from set_asides s where s.duty = 'purge' and s.row_id = all_due.id and s.retry_at > now())
    limit :turn
) due
order by t.id
""")


@dataclass(frozen=True)
class Purge:
    """A row that is over, and its objects: one key, or all keys behind a prefix, which ends in a slash."""

    kind: str
    row_id: uuid.UUID
    tenant_id: uuid.UUID
    location: str


def find_purges(session: ServiceSession) -> tuple[Purge, ...]:
    """Return some of the due rows of every tenant, tenant by tenant."""
    return tuple(
        Purge(row.kind, row.id, row.tenant_id, _location_of(row)) for row in session.execute(_DUE, {"turn": _TURN})
    )


def mark_purged(session: ServiceSession, purge: Purge) -> None:
    """Record that the objects are deleted. They no longer count as stored."""
    if purge.kind == "resume_point":
        session.execute(delete(ResumePoint).where(ResumePoint.id == purge.row_id))
        return
    kind = _KINDS[purge.kind]
    session.execute(update(kind).where(kind.id == purge.row_id, kind.purged_at.is_(None)).values(purged_at=func.now()))


def _location_of(row: Row[Any]) -> str:
    return upload_prefix(row.tenant_id, row.id) if row.kind == "upload" else row.location
