"""What a tenant may have at once.

A quota bounds a state, whichever request leads to it:

| quota | what counts | checked at | when full |
|---|---|---|---|
| `max_running` | running jobs | the claim | the job waits |
| `max_gpu_seconds_per_month` | GPU-seconds used | the claim | the job waits |
| `max_queued` | jobs queued, paused or about to pause | submission, pause | `queue_quota_exceeded` |
| `max_storage_bytes` | bytes of rows whose objects exist | upload, submission | `storage_quota_exceeded` |
| `max_storage_bytes` | the same | the claim | the job waits |
| `max_tokens_per_job` | tokens that the job may train | submission | `token_quota_exceeded` |

Triggers keep the counts of `max_queued` and `max_storage_bytes`, so no code path can forget to. What happens without
the tenant's request is never refused, but it counts: a job that returns to its queue, and what a running job stores.

A check and the insert after it run under a lock of the tenant, so that simultaneous requests cannot pass a quota
together. The locks are taken as late as possible, because other requests of the tenant wait for them.
"""

from __future__ import annotations

import uuid

from sqlalchemy import BigInteger, Boolean, ColumnElement, Select, cast, func, select

from core.db.locks import lock_for_tenant
from core.db.models import File, Queue, StorageTotal, Tenant
from core.db.session import TenantSession
from core.domain.errors import InvalidRequestError, PermissionDeniedError, RateLimitedError
from core.domain.training import TrainingSpec

# The tokens that a chat template may add to a row, beyond the bytes of the row itself.
_TEMPLATE_TOKENS = 64


def has_queue_place(tenant_id: ColumnElement[uuid.UUID]) -> ColumnElement[bool]:
    """Return the condition that one more job may wait. A caller that takes it holds the tenant's lock "queue"."""
    quota = select(Tenant.max_queued).where(Tenant.id == tenant_id).scalar_subquery()
    return _num_waiting(tenant_id).scalar_subquery() < quota


def check_queue(session: TenantSession, tenant_id: uuid.UUID) -> None:
    """Raise RateLimitedError when the maximum number of jobs waits."""
    num_waiting = session.scalars(_num_waiting(tenant_id)).one()
    quota = session.scalars(select(Tenant.max_queued).where(Tenant.id == tenant_id)).one()
    if num_waiting >= quota:
        raise RateLimitedError(
            f"{num_waiting} jobs wait, queued or paused, of {quota} that may. "
            "Wait until some have started, or cancel one.",
            code="queue_quota_exceeded",
        )


def _num_waiting(tenant_id: uuid.UUID | ColumnElement[uuid.UUID]) -> Select[int]:
    """Count by the tenant's queues, which are few and kept by triggers, and not by its jobs."""
    num_waiting = func.sum(Queue.num_queued + Queue.num_paused)
    return select(cast(func.coalesce(num_waiting, 0), BigInteger)).where(Queue.tenant_id == tenant_id)


def is_within_storage() -> ColumnElement[bool]:
    """Return the condition on a tenant's row that its stored bytes are within the quota, so that its jobs may start."""
    return func.within_storage_quota(Tenant.id, Tenant.max_storage_bytes, type_=Boolean)


def check_storage(session: TenantSession, tenant_id: uuid.UUID, *, num_bytes: int = 0) -> None:
    """Raise PermissionDeniedError when the stored bytes plus `num_bytes` exceed the quota."""
    stored, quota = _read_storage(session, tenant_id)
    if quota is not None and stored + num_bytes > quota:
        raise _over_storage(stored, quota)


def refuse_storage(session: TenantSession, tenant_id: uuid.UUID) -> PermissionDeniedError:
    """Return the error for a tenant that stores more than it may."""
    return _over_storage(*_read_storage(session, tenant_id))


def _read_storage(session: TenantSession, tenant_id: uuid.UUID) -> tuple[int, int | None]:
    query = select(func.coalesce(StorageTotal.num_bytes, 0), Tenant.max_storage_bytes).select_from(Tenant)
    query = query.outerjoin(StorageTotal, StorageTotal.tenant_id == Tenant.id).where(Tenant.id == tenant_id)
    stored, quota = session.execute(query).one()
    return stored, quota


def _over_storage(stored: int, quota: int | None) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"{stored} bytes are stored, of {quota} that may be. Delete files, models or checkpoints that you need no "
        "more; they count until their objects are gone, some seconds later.",
        code="storage_quota_exceeded",
    )


def reserve_storage(session: TenantSession, tenant_id: uuid.UUID, *, num_bytes: int) -> None:
    """Check as `check_storage`, and lock: no other transaction of the tenant reserves until this one ends."""
    lock_for_tenant(session, tenant_id, purpose="storage")
    check_storage(session, tenant_id, num_bytes=num_bytes)


def check_tokens(spec: TrainingSpec, *, quota: int | None, dataset: File) -> None:
    """Refuse a job that may train more tokens than the quota. Counts an upper bound: a token has at least a byte."""
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
