"""Makes one job for one submission, however often the client sends it.

OpenAI's client repeats a POST when the answer was lost, and marks the retry with `x-stainless-retry-count`. Other
clients send an `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header-07). The identity of a submission is stored
in the transaction that adds its job, so one never exists without the other.

| request | earlier submission | answer |
|---|---|---|
| with a key | none with this key, or older than `KEY_LIFETIME` | a new job |
| with a key | the same body | the earlier job |
| with a key | another body | IdempotencyKeyReusedError |
| without a key, a first try | any | a new job |
| without a key, a retry | the same body within `RETRY_WINDOW` | the earlier job |
| without a key, a retry | none | a new job |

A request waits for a similar one that is under way. Requests with the same key exclude each other. Without a key, first
tries share the lock of their body, so that equal bodies do not queue up, and a retry takes this lock alone.
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
# The longest pause of OpenAI's client between two tries.
RETRY_WINDOW = timedelta(seconds=120)
# Jobs are looked up by the time in their ids, which is the time of the API's host. Its clock may be wrong.
_ID_WINDOW = timedelta(days=1)


@dataclass(frozen=True)
class Submission:
    """The job of a request. `is_replayed` says that an earlier request made it."""

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
    """Submit a job, or return the job that this submission has made before.

    Raises IdempotencyKeyReusedError, and the errors of `submit_job`.
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
    """Delete expired keys of all tenants."""
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
    """Return a hash of the request's meaning: spelling, order of fields and explicit defaults do not matter."""
    asked = request.model_dump(mode="json", exclude_defaults=True)
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()


def _find_recent(session: TenantSession, tenant_id: uuid.UUID, request_hash: bytes) -> Job | None:
    """Return the newest job in the window that was requested with this body."""
    earliest = first_id_at(session.scalars(select(func.now() - _ID_WINDOW)).one())
    is_recent = (Job.id >= earliest, Job.created_at >= func.now() - RETRY_WINDOW)
    query = select(Job).where(Job.tenant_id == tenant_id, *is_recent, Job.request_hash == request_hash)
    return session.scalar(query.where(Job.deleted_at.is_(None)).order_by(Job.id.desc()).limit(1))
