"""Files: datasets that tenants upload, and result files that the service writes for them."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from typing import Literal

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import defer

from core.db.models import File, Job
from core.db.session import ServiceSession, TenantSession, WorkWriter
from core.domain.errors import ConflictError
from core.domain.files import NewFile
from core.domain.ids import IdKind, format_id, not_found
from core.domain.jobs import UNFINISHED_STATUSES
from core.domain.values import Page

Id = uuid.UUID | ColumnElement[uuid.UUID]


def create_file(session: WorkWriter, tenant_id: uuid.UUID, *, new: NewFile) -> File:
    """Add a stored file. A file with `status_details` is in error."""
    row = File(
        id=new.id,
        tenant_id=tenant_id,
        filename=new.filename,
        purpose=new.purpose,
        object_key=new.object_key,
        size_bytes=new.size_bytes,
        sha256=new.sha256,
        num_examples=new.num_examples,
        status="error" if new.status_details else "processed",
        status_details=new.status_details,
        problems=[asdict(problem) for problem in new.problems],
        report=new.counts,
        expires_at=None if new.lifetime is None else func.now() + new.lifetime,
    )
    session.add(row)
    session.flush()
    return row


def get_file(session: TenantSession, tenant_id: uuid.UUID, *, file_id: uuid.UUID, param: str | None = None) -> File:
    row = session.scalar(select(File).where(is_live_file(File, tenant_id, file_id)))
    if row is None:
        raise not_found(IdKind.FILE, file_id, param=param)
    return row


def is_live_file(files: type[File], tenant_id: Id, file_id: Id) -> ColumnElement[bool]:
    """Return the condition that a row is this file of the tenant, and not deleted."""
    return and_(files.tenant_id == tenant_id, files.id == file_id, files.deleted_at.is_(None))


def list_files(
    session: TenantSession,
    tenant_id: uuid.UUID,
    *,
    purpose: str | None,
    after: uuid.UUID | None,
    limit: int,
    order: Literal["asc", "desc"],
) -> Page[File]:
    """Return the tenant's files without their problems, of which a file may have a hundred."""
    query = (
        select(File)
        .options(defer(File.problems, raiseload=True))
        .where(File.tenant_id == tenant_id, File.deleted_at.is_(None))
    )
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    if after is not None:
        query = query.where(File.id < after if order == "desc" else File.id > after)
    query = query.order_by(File.id.desc() if order == "desc" else File.id)
    return Page.cut(session.scalars(query.limit(limit + 1)).all(), limit)


def delete_file(session: TenantSession, tenant_id: uuid.UUID, *, file_id: uuid.UUID) -> None:
    """Delete a file. Raises ConflictError while an unfinished job needs it."""
    get_file(session, tenant_id, file_id=file_id)
    uses_file = or_(Job.training_file_id == file_id, Job.validation_file_id == file_id)
    job_id = session.scalar(
        select(Job.id).where(Job.tenant_id == tenant_id, uses_file, Job.status.in_(UNFINISHED_STATUSES)).limit(1)
    )
    if job_id is not None:
        raise ConflictError(
            f"The file is in use by {format_id(IdKind.JOB, job_id)}. Cancel that job, or wait until it has ended.",
            code="file_in_use",
        )
    session.execute(update(File).where(File.tenant_id == tenant_id, File.id == file_id).values(deleted_at=func.now()))


def expire_files(session: ServiceSession) -> None:
    """Delete expired files of all tenants, except those that an unfinished job needs."""
    uses_file = and_(
        Job.tenant_id == File.tenant_id,
        or_(Job.training_file_id == File.id, Job.validation_file_id == File.id),
        Job.status.in_(UNFINISHED_STATUSES),
    )
    session.execute(
        update(File)
        .where(File.deleted_at.is_(None), File.expires_at < func.now(), ~select(Job.id).where(uses_file).exists())
        .values(deleted_at=func.now())
        .execution_options(synchronize_session=False)
    )
