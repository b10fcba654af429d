"""A tenant with one row in every table, and the wire's ids of these rows."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine, func

from core.db.models import (
    LEASE_TOKENS,
    Adapter,
    Attempt,
    Checkpoint,
    CheckpointPermission,
    Event,
    IdempotencyKey,
    Job,
    LogLine,
    Observation,
    ResumePoint,
    SetAside,
    Upload,
    UploadPart,
    Usage,
)
from core.db.session import ServiceSession, service_transaction, tenant_transaction
from core.domain.api_keys import format_key_id
from core.domain.files import NewFile
from core.domain.ids import IdKind, format_id, new_id
from core.domain.jobs import checkpoint_model_name, fine_tuned_model_name, pool_name
from core.domain.objects import attempt_prefix, file_key
from core.services.files import create_file
from core.storage import ObjectStore
from tests.factories.bases import BASE_MODEL
from tests.factories.tenants import Tenant

ROW = b'{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Planted."}]}'
FILES: list[dict[str, Any]] = [{"name": "adapter_config.json", "size_bytes": len(ROW), "sha256": "0" * 64}]


@dataclass(frozen=True)
class Planted:
    """Every kind of id of one tenant, as the wire has it."""

    file: str
    job: str
    event: str
    checkpoint: str
    adapter: str
    model: str
    checkpoint_model: str
    api_key: str
    tenant: str
    upload: str
    part: str
    permission: str
    log_line: str
    object_keys: tuple[str, ...]

    @property
    def ids(self) -> dict[str, str]:
        """Return the ids by kind."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, str)}


@dataclass(frozen=True)
class _SucceededJob:
    """A job that has succeeded, as the rows that belong to it name it."""

    tenant_id: uuid.UUID
    job_id: uuid.UUID
    token: int
    model: str

    @property
    def own(self) -> dict[str, Any]:
        """Return the columns that say whose a row is."""
        return {"tenant_id": self.tenant_id, "job_id": self.job_id}

    @property
    def prefix(self) -> str:
        return attempt_prefix(self.tenant_id, self.job_id, self.token)


def plant(owner: Engine, api: Engine, store: ObjectStore, tenant: Tenant) -> Planted:
    """Add a file, a queued job and a succeeded one with all that it leaves behind, their objects included."""
    file_id = new_id()
    object_key = file_key(tenant.id, file_id)
    store.put_bytes(object_key, ROW, content_type="application/jsonl")
    with tenant_transaction(api, tenant.id, actor="planting") as session:
        create_file(
            session,
            tenant.id,
            new=NewFile(file_id, "a.jsonl", "fine-tune", object_key, len(ROW), "0" * 64, num_examples=1),
        )
    with service_transaction(owner) as session:
        succeeded = _plant_jobs(session, tenant, file_id)
        checkpoint, adapter = _plant_artifacts(session, succeeded)
        part = _plant_upload(session, tenant, object_key)
        permission = _plant_permission(session, checkpoint)
        event, log_line = _plant_traces(session, succeeded)
        store.put_bytes(succeeded.prefix + FILES[0]["name"], ROW, content_type="application/json")
        return Planted(
            file=format_id(IdKind.FILE, file_id),
            job=format_id(IdKind.JOB, succeeded.job_id),
            event=format_id(IdKind.EVENT, event.id),
            checkpoint=format_id(IdKind.CHECKPOINT, checkpoint.id),
            adapter=format_id(IdKind.ADAPTER, adapter.id),
            model=succeeded.model,
            checkpoint_model=checkpoint.model_name,
            api_key=format_key_id(tenant.key_id),
            tenant=format_id(IdKind.TENANT, tenant.id),
            upload=format_id(IdKind.UPLOAD, part.upload_id),
            part=format_id(IdKind.PART, part.id),
            permission=format_id(IdKind.PERMISSION, permission.id),
            log_line=format_id(IdKind.LOG_LINE, log_line.id),
            object_keys=(object_key, succeeded.prefix + FILES[0]["name"]),
        )


def _plant_jobs(session: ServiceSession, tenant: Tenant, file_id: uuid.UUID) -> _SucceededJob:
    """Add a queued job, and one that has succeeded with its attempt, metrics and usage."""
    job_id, token = new_id(), session.scalars(LEASE_TOKENS.next_value()).one()
    name = fine_tuned_model_name(BASE_MODEL, tenant_slug=tenant.slug, suffix=None, digits=job_id.hex[-8:])
    succeeded = _SucceededJob(tenant.id, job_id, token, name)
    session.add_all([_job(tenant, job_id, file_id, name), _job(tenant, new_id(), file_id, None)])
    session.flush()
    attempt = Attempt(
        id=new_id(),
        number=1,
        lease_token=token,
        worker_name="w",
        entry_charge_seconds=0,
        outcome="succeeded",
        ended_at=func.now(),
        **succeeded.own,
    )
    metric = Observation(
        step=32,
        lease_token=token,
        train_loss=1,
        train_token_accuracy=1,
        learning_rate=1,
        grad_norm=1,
        num_tokens=1,
        **succeeded.own,
    )
    session.add_all([attempt, metric])
    session.flush()
    session.add(Usage(id=new_id(), tenant_id=tenant.id, attempt_id=attempt.id, gpu_seconds=1, trained_tokens=1))
    return succeeded


def _plant_artifacts(session: ServiceSession, succeeded: _SucceededJob) -> tuple[Checkpoint, Adapter]:
    """Add what the job has stored: a checkpoint, its adapter and a resume point."""
    stored = {"object_prefix": succeeded.prefix, "files": FILES, **succeeded.own}
    checkpoint = Checkpoint(
        id=new_id(),
        lease_token=succeeded.token,
        step=1,
        model_name=checkpoint_model_name(succeeded.model, 1),
        metrics={},
        **stored,
    )
    adapter = Adapter(id=new_id(), name=succeeded.model, base_model_id=BASE_MODEL, size_bytes=1, **stored)
    resume_point = ResumePoint(id=new_id(), lease_token=succeeded.token, step=1, **stored)
    session.add_all([checkpoint, adapter, resume_point])
    session.flush()
    return checkpoint, adapter


def _plant_upload(session: ServiceSession, tenant: Tenant, object_key: str) -> UploadPart:
    """Add a pending upload with one part."""
    upload = Upload(
        id=new_id(),
        tenant_id=tenant.id,
        filename="a.jsonl",
        purpose="fine-tune",
        mime_type="text/plain",
        size_bytes=10**6,
        expires_at=func.now() + timedelta(hours=1),
    )
    session.add(upload)
    session.flush()
    part = UploadPart(id=new_id(), tenant_id=tenant.id, upload_id=upload.id, object_key=object_key, size_bytes=1)
    session.add(part)
    session.flush()
    return part


def _plant_permission(session: ServiceSession, checkpoint: Checkpoint) -> CheckpointPermission:
    permission = CheckpointPermission(
        id=new_id(), tenant_id=checkpoint.tenant_id, checkpoint_id=checkpoint.id, project_id="nobody-here"
    )
    session.add(permission)
    session.flush()
    return permission


def _plant_traces(session: ServiceSession, succeeded: _SucceededJob) -> tuple[Event, LogLine]:
    """Add what else names the job: an event, a log line, an idempotency key and a row set aside."""
    event = Event(id=new_id(), level="info", type="message", message="Planted.", **succeeded.own)
    log_line = LogLine(id=new_id(), attempt_number=1, level="info", name="planted", details={}, **succeeded.own)
    key = IdempotencyKey(key="planted", request_hash=bytes(32), **succeeded.own)
    set_aside = SetAside(
        duty="claim", row_id=succeeded.job_id, tenant_id=succeeded.tenant_id, reason="Planted.", retry_at=func.now()
    )
    session.add_all([event, log_line, key, set_aside])
    session.flush()
    return event, log_line


def _job(tenant: Tenant, job_id: uuid.UUID, file_id: uuid.UUID, name: str | None) -> Job:
    """Return a job that has succeeded under a name, or one that is queued."""
    adapter = {"rank": 8, "alpha": 16, "dropout": 0, "target_modules": ["q_proj"], "use_rslora": False}
    spec = {
        "adapter": adapter,
        "n_epochs": 1,
        "batch_size": 1,
        "learning_rate": 1e-4,
        "learning_rate_multiplier": 1.0,
        "learning_rate_schedule": "cosine",
        "warmup_ratio": 0,
        "weight_decay": 0,
        "max_grad_norm": 1,
        "max_seq_len": 128,
        "seed": 1,
    }
    return Job(
        id=job_id,
        tenant_id=tenant.id,
        base_model_id=BASE_MODEL,
        pool=pool_name(BASE_MODEL, None),
        training_file_id=file_id,
        validation_file_id=file_id,
        spec=spec,
        total_steps=1,
        trained_steps=1,
        status="succeeded" if name else "queued",
        fine_tuned_model=name,
        finished_at=func.now() if name else None,
    )
