"""One job for one submission, however often the client sends it.

OpenAI's client sends a POST again after a lost answer, and says so in `x-stainless-retry-count`; careful callers send
an `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header-07). What a submission was is stored in the transaction
of the job itself, so there is never one without the other.

Locks make a request wait for the like of it that is under way: those with one key exclude each other; without a key,
first tries share the lock of their body and only a retry takes it alone, so that equal bodies do not queue up.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from sqlalchemy import delete, func, select

from core.db.locks import lock
from core.db.models import IdempotencyKey, Job
from core.db.session import ServiceSession, TenantSession
from core.domain.errors import IdempotencyKeyReusedError
from core.domain.ids import first_id_at
from core.domain.job_requests import JobRequest
from core.services.jobs import get_job
from core.services.submissions import DatasetRows, submit_job

KEY_LIFETIME = timedelta(hours=24)
# The longest that the client waits between two tries.
RETRY_WINDOW = timedelta(seconds=120)
# Ids are looked up by their time, which is that of the host that made them: its clock may be wrong.
_ID_WINDOW = timedelta(days=1)


@dataclass(frozen=True)
class Submission:
    """The job of a request. `is_replayed` when an earlier request had made it."""

    job: Job
    is_replayed: bool


def submit_once(
    session: TenantSession,
    tenant_id: uuid.UUID,
    *,
    request: JobRequest,
    idempotency_key: str | None,
    is_retry: bool,
    is_checked: Callable[[DatasetRows], bool] = lambda _rows: True,
) -> Submission:
    """Submit a job, or return the one that this submission made before.

    Raises IdempotencyKeyReusedError, and as `submit_job` does.
    """
    submit = partial(submit_job, session, tenant_id, request=request, is_checked=is_checked)
    request_hash = _hash_request(request)
    if idempotency_key is not None:
        return _submit_with_key(session, tenant_id, submit, request_hash=request_hash, key=idempotency_key)
    name = f"{tenant_id} {request_hash.hex()}"
    if is_retry:
        lock(session, name)
        if (job := _find_recent(session, tenant_id, request_hash)) is not None:
            return Submission(job, is_replayed=True)
    shared_lock = None if is_retry else name
    job = submit(request_hash=request_hash, shared_lock=shared_lock)
    return Submission(job, is_replayed=False)


def forget_expired_keys(session: ServiceSession) -> None:
    """Delete the keys of all tenants that are past their lifetime."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < func.now() - KEY_LIFETIME))


def _submit_with_key(
    session: TenantSession, tenant_id: uuid.UUID, submit: Callable[..., Job], *, request_hash: bytes, key: str
) -> Submission:
    lock(session, f"{tenant_id} key {key}")
    expired = IdempotencyKey.created_at < func.now() - KEY_LIFETIME
    session.execute(
        delete(IdempotencyKey).where(IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key == key, expired)
    )
    if (row := session.get(IdempotencyKey, (tenant_id, key))) is not None:
        if row.request_hash != request_hash:
            raise IdempotencyKeyReusedError("This Idempotency-Key was used for another request. Use a new one.")
        return Submission(get_job(session, tenant_id, job_id=row.job_id), is_replayed=True)
    job = submit(request_hash=request_hash)
    session.add(IdempotencyKey(tenant_id=tenant_id, key=key, request_hash=request_hash, job_id=job.id))
    return Submission(job, is_replayed=False)


def _hash_request(request: JobRequest) -> bytes:
    """Return a hash of what is asked for: neither spelling, order of fields nor spelled-out defaults matter."""
    asked = request.model_dump(mode="json", exclude_defaults=True)
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()


def _find_recent(session: TenantSession, tenant_id: uuid.UUID, request_hash: bytes) -> Job | None:
    """Return the newest job of the window that was asked for in these words."""
    earliest = first_id_at(session.scalars(select(func.now() - _ID_WINDOW)).one())
    is_recent = (Job.id >= earliest, Job.created_at >= func.now() - RETRY_WINDOW)
    query = select(Job).where(Job.tenant_id == tenant_id, *is_recent, Job.request_hash == request_hash)
    return session.scalar(query.where(Job.deleted_at.is_(None)).order_by(Job.id.desc()).limit(1))
