"""What a tenant may have at once. What passes a quota later waits (running jobs, GPU-seconds); the rest is refused.

Counting and adding are done under a lock of the tenant, so that requests at once cannot pass a quota together. The
locks are taken as late as can be, because a tenant's other requests of the kind wait for them.
"""

from __future__ import annotations

import uuid

from sqlalchemy import BigInteger, ColumnElement, Select, cast, func, select
from sqlalchemy.orm import Session

from core.db.locks import lock_for_tenant
from core.db.models import Adapter, File, Queue, Tenant, Upload
from core.domain.errors import InvalidRequestError, PermissionDeniedError, RateLimitedError
from core.domain.training import TrainingSpec

# What a chat template may add to a row beyond the row's own bytes.
_TEMPLATE_TOKENS = 64


def has_queue_place(tenant_id: ColumnElement[uuid.UUID]) -> ColumnElement[bool]:
    """Return the condition that a place in the queue is free. Whoever takes it holds the tenant's lock "queue"."""
    quota = select(Tenant.max_queued).where(Tenant.id == tenant_id).scalar_subquery()
    return _num_queued(tenant_id).scalar_subquery() < quota


def refuse_queue_place(session: Session, tenant_id: uuid.UUID) -> RateLimitedError:
    """Return the error of a full queue."""
    num_queued = session.scalars(_num_queued(tenant_id)).one()
    quota = session.scalars(select(Tenant.max_queued).where(Tenant.id == tenant_id)).one()
    return RateLimitedError(
        f"{num_queued} jobs are queued, of {quota} that may be. Wait until some have started.",
        code="queue_quota_exceeded",
    )


def _num_queued(tenant_id: uuid.UUID | ColumnElement[uuid.UUID]) -> Select[int]:
    """Count by the tenant's queues, which are few and which triggers keep, and not by its jobs."""
    return select(cast(func.coalesce(func.sum(Queue.num_queued), 0), BigInteger)).where(Queue.tenant_id == tenant_id)


def check_storage(session: Session, tenant_id: uuid.UUID, *, num_bytes: int = 0) -> None:
    """Raise PermissionDeniedError when what is stored and `num_bytes` more are over the quota."""
    quota = session.scalars(select(Tenant.max_storage_bytes).where(Tenant.id == tenant_id)).one()
    if quota is None:
        return
    in_files = select(func.sum(File.size_bytes)).where(File.tenant_id == tenant_id, File.deleted_at.is_(None))
    in_adapters = select(func.sum(Adapter.size_bytes)).where(
        Adapter.tenant_id == tenant_id, Adapter.deleted_at.is_(None)
    )
    promised = select(func.sum(Upload.size_bytes)).where(
        Upload.tenant_id == tenant_id,
        Upload.status.in_(("pending", "completing")),
        Upload.expires_at > func.now(),
    )
    stored = sum(int(session.scalar(query) or 0) for query in (in_files, in_adapters, promised))
    if stored + num_bytes > quota:
        raise PermissionDeniedError(
            f"{stored} bytes are stored, of {quota} that may be. Delete files that you need no more.",
            code="storage_quota_exceeded",
        )


def reserve_storage(session: Session, tenant_id: uuid.UUID, *, num_bytes: int) -> None:
    """As `check_storage`, and nobody else of the tenant can reserve until the transaction ends."""
    lock_for_tenant(session, tenant_id, purpose="storage")
    check_storage(session, tenant_id, num_bytes=num_bytes)


def check_tokens(spec: TrainingSpec, *, quota: int | None, dataset: File) -> None:
    """Refuse a job that may train more tokens than the quota says. Counted from above: a token has a byte at least."""
    by_length = dataset.num_examples * spec.max_seq_len
    by_bytes = dataset.size_bytes + dataset.num_examples * _TEMPLATE_TOKENS
    num_tokens = spec.n_epochs * min(by_length, by_bytes)
    if quota is not None and num_tokens > quota:
        raise InvalidRequestError(
            f"The job may train up to {num_tokens} tokens; your organization's jobs may train {quota}. "
            "Use fewer epochs, fewer rows or a smaller max_seq_len.",
            code="token_quota_exceeded",
            param="training_file",
        )
