"""Jobs that are submitted, claimed, reported on and ended as a worker does it, without training anything."""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any

from openai import OpenAI
from sqlalchemy import Engine, select, text, update

from core.db.models import Adapter, Job
from core.db.session import service_transaction
from core.domain.failures import Failure
from core.domain.files import NewFile
from core.domain.ids import IdKind, new_id, parse_id
from core.domain.job_requests import JobRequest
from core.domain.jobs import JobStatus
from core.domain.leases import Lease
from core.domain.objects import attempt_prefix, file_key
from core.domain.training import Quantization
from core.domain.values import StoredArtifact
from core.services import attempts, checkpoints, claims, observations
from core.services.files import create_file
from core.services.observations import StepRecord
from core.services.submissions import submit_job
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from tests.factories.bases import BASE_MODEL, POOL
from tests.factories.objects import put
from tests.factories.tenants import Tenant
from tests.sessions import any_role_transaction

_ROWS = "\n".join(
    json.dumps(
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
    )
    for n in range(400)
).encode()


def queue_job(owner: Engine, tenant: Tenant, *, priority: int = 0, quantization: Quantization | None = None) -> Job:
    """Submit a job whose dataset has a row in the database and no object in the store."""
    with any_role_transaction(owner) as session:
        file_id = new_id()
        key = file_key(tenant.id, file_id)
        create_file(session, tenant.id, new=NewFile(file_id, "a", "fine-tune", key, 1, "0" * 64, num_examples=4))
        request = JobRequest(
            base_model_id=BASE_MODEL, training_file_id=file_id, priority=priority, quantization=quantization
        )
        return submit_job(session, tenant.id, request=request)


def queue_trainable_job(owner: Engine, servers: ServerAddresses, tenant: Tenant) -> uuid.UUID:
    """Submit a job whose dataset of 400 rows is stored, and return its id."""
    file_id = new_id()
    key = file_key(tenant.id, file_id)
    S3ObjectStore(servers.storage).put_bytes(key, _ROWS, content_type="application/jsonl")
    with any_role_transaction(owner) as session:
        new = NewFile(file_id, "a", "fine-tune", key, len(_ROWS), hashlib.sha256(_ROWS).hexdigest(), num_examples=400)
        create_file(session, tenant.id, new=new)
        request = JobRequest(base_model_id=BASE_MODEL, training_file_id=file_id)
        return submit_job(session, tenant.id, request=request).id


def submit(client: OpenAI, file_id: str, **options: Any) -> Any:
    """Submit a job as a client does it."""
    model = options.pop("model", BASE_MODEL)
    return client.fine_tuning.jobs.create(model=model, training_file=file_id, **options)


def claim(worker: Engine, lease_seconds: float = 60) -> Lease | None:
    with service_transaction(worker) as session:
        job = claims.claim_job(session, POOL, worker_name="w", lease_seconds=lease_seconds)
    if job is None:
        return None
    assert job.lease_token is not None
    return Lease(job.id, job.tenant_id, job.lease_token)


def start_job(owner: Engine, tenant: Tenant) -> Lease:
    """Queue a job of a tenant and make it running, past every other job in the queue."""
    job = queue_job(owner, tenant)
    with service_transaction(owner) as session:
        session.connection().exec_driver_sql("update jobs set run_after = 'infinity' where status = 'queued'")
        session.connection().exec_driver_sql("update jobs set run_after = now() where id = %s", (job.id,))
    lease = claim(owner, lease_seconds=3600)
    assert lease is not None
    assert lease.job_id == job.id
    return lease


def status_of(owner: Engine, lease: Lease) -> str:
    with service_transaction(owner) as session:
        return session.scalars(select(Job.status).where(Job.id == lease.job_id)).one()


def make_claimable(owner: Engine, lease: Lease) -> None:
    with service_transaction(owner) as session:
        session.execute(text("update jobs set run_after = now() where id = :id"), {"id": lease.job_id})


def record_step(engine: Engine, lease: Lease, step: int, *, loss: float = 1.0) -> None:
    record = StepRecord(step, loss, train_token_accuracy=0.5, learning_rate=1e-4, grad_norm=1.0, num_tokens=10)
    with service_transaction(engine) as session:
        observations.record_step(session, lease, record=record, total_steps=1000)


def fail_job(engine: Engine, lease: Lease) -> None:
    with service_transaction(engine) as session:
        attempts.fail_attempt(
            session, lease, failure=Failure(code="diverged", message="It diverged."), is_job_fault=True
        )


def finish(worker: Engine, store: S3ObjectStore, lease: Lease) -> None:
    """End a job with an adapter, a checkpoint and a result file that are all stored."""
    prefix = attempt_prefix(lease.tenant_id, lease.job_id, lease.token)
    checkpoint = StoredArtifact(prefix + "checkpoints/step-1/", put(store, prefix + "checkpoints/step-1/a"))
    adapter = StoredArtifact(prefix + "adapter/", put(store, prefix + "adapter/a"))
    stored = store.put_bytes(prefix + "result/r.csv", b"r", content_type="text/csv")
    result = NewFile(new_id(), "r.csv", "fine-tune-results", prefix + "result/r.csv", stored.size_bytes, stored.sha256)
    with service_transaction(worker) as session:
        checkpoints.record_checkpoint(session, lease, step=1, artifact=checkpoint, metrics={})
    with service_transaction(worker) as session:
        attempts.succeed_attempt(session, lease, adapter=adapter, result_file=result, trained_tokens=1)


def age_jobs(owner: Engine, days: float) -> None:
    """Let the jobs that have ended have done so earlier."""
    with service_transaction(owner) as session:
        older = "update jobs set finished_at = finished_at - make_interval(secs => :s) where finished_at is not null"
        session.execute(text(older), {"s": days * 86400})


def add_adapter(owner: Engine, tenant: Tenant, job_id: str) -> str:
    """Let a job have succeeded, without a worker, and return its model's name."""
    row_id, name = parse_id(IdKind.JOB, job_id), f"ft:{BASE_MODEL}:{tenant.slug}::{job_id[-8:]}"
    with service_transaction(owner) as session:
        ended = {"status": JobStatus.SUCCEEDED, "fine_tuned_model": name}
        job = session.get_one(Job, row_id)
        session.execute(update(Job).where(Job.id == row_id).values(**ended, finished_at=job.created_at))
        session.add(
            Adapter(
                id=new_id(),
                tenant_id=tenant.id,
                job_id=row_id,
                name=name,
                base_model_id=BASE_MODEL,
                object_prefix=f"tenants/{tenant.id}/jobs/{row_id}/1/adapter/",
                files=[],
                size_bytes=0,
            )
        )
    return name
