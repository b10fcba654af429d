"""Adapters and published checkpoints: what training leaves behind, as rows that point at objects."""

from __future__ import annotations

import uuid

from sqlalchemy import Select, func, select, update
from sqlalchemy.orm import Session

from core.db.models import Adapter, Checkpoint
from core.domain.errors import NotFoundError
from core.domain.ids import IdKind, not_found
from core.services.pages import Page


def get_adapter(session: Session, tenant_id: uuid.UUID, *, adapter_id: uuid.UUID) -> Adapter:
    row = session.scalar(_live(tenant_id).where(Adapter.id == adapter_id))
    if row is None:
        raise not_found(IdKind.ADAPTER, adapter_id)
    return row


def find_adapter(session: Session, tenant_id: uuid.UUID, *, name: str) -> Adapter:
    row = session.scalar(_live(tenant_id).where(Adapter.name == name))
    if row is None:
        raise NotFoundError(f"The model {name[:200]!r} does not exist.", code="model_not_found", param="model")
    return row


def list_adapters(session: Session, tenant_id: uuid.UUID, *, after: uuid.UUID | None, limit: int) -> Page[Adapter]:
    query = _live(tenant_id)
    if after is not None:
        query = query.where(Adapter.id < after)
    return Page.cut(session.scalars(query.order_by(Adapter.id.desc()).limit(limit + 1)).all(), limit)


def delete_adapter(session: Session, tenant_id: uuid.UUID, *, name: str) -> None:
    """Delete a fine-tuned model: its objects go soon after, its job stays."""
    adapter = find_adapter(session, tenant_id, name=name)
    session.execute(
        update(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.id == adapter.id).values(deleted_at=func.now())
    )


def list_checkpoints(
    session: Session, tenant_id: uuid.UUID, *, job_id: uuid.UUID, after: uuid.UUID | None, limit: int
) -> Page[Checkpoint]:
    query = select(Checkpoint).where(
        Checkpoint.tenant_id == tenant_id, Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None)
    )
    if after is not None:
        query = query.where(Checkpoint.id < after)
    return Page.cut(session.scalars(query.order_by(Checkpoint.id.desc()).limit(limit + 1)).all(), limit)


def _live(tenant_id: uuid.UUID) -> Select[Adapter]:
    return select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.deleted_at.is_(None))
