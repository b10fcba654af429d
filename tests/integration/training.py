"""Jobs that are submitted, claimed and reported on as a worker does it, without training anything."""

from __future__ import annotations

import uuid
from typing import Literal

from sqlalchemy import Engine

from core.db.models import Job
from core.db.session import service_transaction
from core.domain.failures import Failure
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.job_requests import JobRequest
from core.domain.jobs import pool_name
from core.domain.leases import Lease
from core.services import attempts, claims, observations
from core.services.files import create_file
from core.services.observations import StepRecord
from core.services.submissions import submit_job

BASE_MODEL = "acme-labs/tiny-base"
POOL = pool_name(BASE_MODEL, None)


def queue_job(
    owner: Engine, tenant_id: uuid.UUID, *, priority: int = 0, quantization: Literal["nf4"] | None = None
) -> Job:
    with service_transaction(owner) as session:
        file_id = new_id()
        create_file(session, tenant_id, new=NewFile(file_id, "a", "fine-tune", "k", 1, "0" * 64, num_examples=4))
        request = JobRequest(
            base_model_id=BASE_MODEL, training_file_id=file_id, priority=priority, quantization=quantization
        )
        return submit_job(session, tenant_id, request=request)


def start_job(owner: Engine, tenant_id: uuid.UUID) -> Lease:
    """Queue a job of a tenant and make it running, past every other job in the queue."""
    job = queue_job(owner, tenant_id)
    with service_transaction(owner) as session:
        session.connection().exec_driver_sql("update jobs set run_after = 'infinity' where status = 'queued'")
        session.connection().exec_driver_sql("update jobs set run_after = now() where id = %s", (job.id,))
        claimed = claims.claim_job(session, POOL, worker_name="w", lease_seconds=3600)
    assert claimed is not None
    assert claimed.id == job.id
    assert claimed.lease_token is not None
    return Lease(claimed.id, claimed.tenant_id, claimed.lease_token)


def record_step(engine: Engine, lease: Lease, step: int, *, loss: float = 1.0) -> None:
    record = StepRecord(step, loss, train_token_accuracy=0.5, learning_rate=1e-4, grad_norm=1.0, num_tokens=10)
    with service_transaction(engine) as session:
        observations.record_step(session, lease, record=record, total_steps=1000)


def fail_job(engine: Engine, lease: Lease) -> None:
    with service_transaction(engine) as session:
        attempts.fail_attempt(
            session, lease, failure=Failure(code="diverged", message="It diverged."), is_job_fault=True
        )
