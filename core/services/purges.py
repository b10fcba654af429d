"""What tenants deleted, or let expire, and whose objects are still there. Deleting them twice does no harm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from core.db.models import Adapter, Checkpoint, File, Upload
from core.domain.objects import upload_prefix

_LIMIT = 100
T = TypeVar("T", Adapter, Checkpoint)


@dataclass(frozen=True)
class Purge:
    """A row that is over, and its objects: one key, or all behind a prefix, which ends in a slash."""

    row: File | Upload | Adapter | Checkpoint
    location: str


def find_purges(session: Session) -> tuple[Purge, ...]:
    """Return some of what is due."""
    files = session.scalars(select(File).where(File.deleted_at.is_not(None), File.purged_at.is_(None)).limit(_LIMIT))
    is_over = or_(Upload.status.in_(("completed", "cancelled")), Upload.expires_at < func.now())
    uploads = session.scalars(select(Upload).where(Upload.purged_at.is_(None), is_over).limit(_LIMIT))
    return (
        *(Purge(file, file.object_key) for file in files),
        *(Purge(upload, upload_prefix(upload.tenant_id, upload.id)) for upload in uploads),
        *(Purge(row, row.object_prefix) for row in _deleted(session, Adapter)),
        *(Purge(row, row.object_prefix) for row in _deleted(session, Checkpoint)),
    )


def mark_purged(session: Session, purge: Purge) -> None:
    """Say that the objects are gone."""
    session.merge(purge.row).purged_at = func.now()  # the database's clock


def _deleted(session: Session, kind: type[T]) -> Sequence[T]:
    query = select(kind).where(kind.deleted_at.is_not(None), kind.purged_at.is_(None)).limit(_LIMIT)
    return session.scalars(query).all()
