"""Published checkpoints: how they are recorded, and which other tenants may read them.

A permission names another tenant by its wire id or its slug. The service does not check whether this tenant exists,
because the answer would reveal it. Row-level security lets exactly that tenant read exactly that checkpoint.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert

from core.db.models import Checkpoint, CheckpointPermission, Job, Tenant
from core.db.session import ServiceSession, TenantSession
from core.domain.errors import ConflictError, NotFoundError
from core.domain.ids import IdKind, format_id, new_id, not_found
from core.domain.jobs import UNFINISHED_STATUSES, checkpoint_model_name
from core.domain.leases import Lease
from core.domain.values import Page, StoredArtifact
from core.services.adapters import name_adapter
from core.services.events import record_event
from core.services.leases import lock_held


def record_checkpoint(
    session: ServiceSession, lease: Lease, *, step: int, artifact: StoredArtifact, metrics: dict[str, Any]
) -> tuple[str, ...]:
    """Publish a checkpoint with stored and verified objects. Return the object prefixes that no row names.

    A published checkpoint stays: if an earlier attempt has published this step, the new one is not published.
    """
    job = lock_held(session, lease)
    shown = select(Checkpoint.object_prefix).where(Checkpoint.job_id == job.id, Checkpoint.step == step)
    if prefix := session.scalar(shown):
        return () if prefix == artifact.object_prefix else (artifact.object_prefix,)
    session.add(
        Checkpoint(
            id=new_id(),
            tenant_id=job.tenant_id,
            job_id=job.id,
            lease_token=lease.token,
            step=step,
            model_name=checkpoint_model_name(name_adapter(session, job), step),
            object_prefix=artifact.object_prefix,
            files=artifact.dump_files(),
            size_bytes=artifact.size_bytes,
            metrics=metrics,
        )
    )
    record_event(session, job, message=f"Checkpoint created at step {step}.")
    return ()


def find_checkpoint(session: TenantSession, tenant_id: uuid.UUID, *, name: str) -> Checkpoint:
    """Return the checkpoint with this model name, of the tenant or shared with it."""
    slug = select(Tenant.slug).where(Tenant.id == tenant_id).scalar_subquery()
    names_tenant = CheckpointPermission.project_id.in_((format_id(IdKind.TENANT, tenant_id), slug))
    shared = select(CheckpointPermission.checkpoint_id).where(names_tenant)
    return _find(session, name, or_(Checkpoint.tenant_id == tenant_id, Checkpoint.id.in_(shared)))


def find_own_checkpoint(session: TenantSession, tenant_id: uuid.UUID, *, name: str) -> Checkpoint:
    return _find(session, name, Checkpoint.tenant_id == tenant_id)


def delete_checkpoint(session: TenantSession, tenant_id: uuid.UUID, *, name: str) -> None:
    """Delete a checkpoint. Raises ConflictError while its job may resume from it."""
    checkpoint = find_own_checkpoint(session, tenant_id, name=name)
    job = select(Job.id).where(
        Job.tenant_id == tenant_id, Job.id == checkpoint.job_id, Job.status.in_(UNFINISHED_STATUSES)
    )
    if session.scalar(job) is not None:
        raise ConflictError("The checkpoint's job has not ended. Cancel it, or wait.", code="model_in_use")
    session.execute(
        update(Checkpoint)
        .where(Checkpoint.tenant_id == tenant_id, Checkpoint.id == checkpoint.id)
        .values(deleted_at=func.now())
    )


def share_checkpoint(
    session: TenantSession, tenant_id: uuid.UUID, *, name: str, project_ids: Sequence[str]
) -> Sequence[CheckpointPermission]:
    """Let others read a checkpoint. Existing permissions stay."""
    checkpoint = find_own_checkpoint(session, tenant_id, name=name)
    rows = [
        {"id": new_id(), "tenant_id": tenant_id, "checkpoint_id": checkpoint.id, "project_id": project_id}
        for project_id in dict.fromkeys(project_ids)
    ]
    session.execute(insert(CheckpointPermission).values(rows).on_conflict_do_nothing())
    query = _permissions(tenant_id, checkpoint).where(CheckpointPermission.project_id.in_(project_ids))
    return session.scalars(query.order_by(CheckpointPermission.id)).all()


def list_permissions(
    session: TenantSession,
    tenant_id: uuid.UUID,
    *,
    name: str,
    after: uuid.UUID | None,
    limit: int,
    order: Literal["ascending", "descending"],
    project_id: str | None,
) -> Page[CheckpointPermission]:
    query = _permissions(tenant_id, find_own_checkpoint(session, tenant_id, name=name))
    if project_id is not None:
        query = query.where(CheckpointPermission.project_id == project_id)
    key = CheckpointPermission.id
    if after is not None:
        query = query.where(key > after if order == "ascending" else key < after)
    query = query.order_by(key if order == "ascending" else key.desc())
    return Page.cut(session.scalars(query.limit(limit + 1)).all(), limit)


def revoke_permission(session: TenantSession, tenant_id: uuid.UUID, *, name: str, permission_id: uuid.UUID) -> None:
    checkpoint = find_own_checkpoint(session, tenant_id, name=name)
    revoked = session.scalar(
        delete(CheckpointPermission)
        .where(
            CheckpointPermission.tenant_id == tenant_id,
            CheckpointPermission.checkpoint_id == checkpoint.id,
            CheckpointPermission.id == permission_id,
        )
        .returning(CheckpointPermission.id)
    )
    if revoked is None:
        raise not_found(IdKind.PERMISSION, permission_id)


def _find(session: TenantSession, name: str, is_readable: ColumnElement[bool]) -> Checkpoint:
    query = select(Checkpoint).where(Checkpoint.model_name == name, Checkpoint.deleted_at.is_(None), is_readable)
    row = session.scalar(query.order_by(Checkpoint.id.desc()).limit(1))
    if row is None:
        raise NotFoundError(f"The model {name[:200]!r} does not exist.", code="model_not_found", param="model")
    return row


def _permissions(tenant_id: uuid.UUID, checkpoint: Checkpoint) -> Select[CheckpointPermission]:
    return select(CheckpointPermission).where(
        CheckpointPermission.tenant_id == tenant_id, CheckpointPermission.checkpoint_id == checkpoint.id
    )
