"""Makes orders for the trainer from rows. URLs are signed without a request to the object store."""

from __future__ import annotations

from core.db.models import BaseModelRow, File, Job, Tenant
from core.db.session import ServiceSession
from core.domain.ids import IdKind, format_id
from core.domain.jobs import fine_tuned_model_name, pool_name
from core.domain.leases import Lease
from core.domain.training import TrainingSpec
from core.services.resume_points import list_resume_points
from core.settings import TrainerSettings
from core.storage import ObjectStore
from worker.messages import JobFacts, LoadBase, StartJob
from worker.supervisor.artifacts import grant_file, grant_resume_point


def lease_of(job: Job) -> Lease:
    assert job.lease_token is not None
    return Lease(job_id=job.id, tenant_id=job.tenant_id, token=job.lease_token)


def pools_of(base: BaseModelRow) -> tuple[str, ...]:
    return tuple(pool_name(base.id, quantization) for quantization in (None, *base.quantizations))


def order_base(base: BaseModelRow, pool: str, *, settings: TrainerSettings) -> LoadBase:
    quantization = next(q for q in (None, *base.quantizations) if pool_name(base.id, q) == pool)
    return LoadBase.model_validate(
        {
            "base_model_id": base.id,
            "source_kind": base.source["kind"],
            "location": base.source["location"],
            "revision": base.source["revision"],
            "dtype": base.dtype,
            "quantization": quantization,
            "target_modules": tuple(base.target_modules),
            "chat_template": base.chat_template,
            "slots": base.slots,
            "max_rank": base.max_rank,
            "max_tokens_per_step": base.max_tokens_per_step,
            "cache_dir": str(settings.cache_dir.resolve()),
            "resume_steps": settings.resume_steps,
            "resume_seconds": settings.resume_seconds,
            "storage_patience_seconds": settings.storage_patience_seconds,
        }
    )


def order_job(session: ServiceSession, job: Job, *, store: ObjectStore) -> StartJob:
    tenant = session.get_one(Tenant, job.tenant_id)
    training_file = session.get_one(File, job.training_file_id)
    validation_file = session.get(File, job.validation_file_id) if job.validation_file_id else None
    lease = lease_of(job)
    name = fine_tuned_model_name(job.base_model_id, tenant_slug=tenant.slug, suffix=job.suffix, digits=job.name_digits)
    return StartJob(
        lease_token=lease.token,
        tenant_id=str(job.tenant_id),
        share=tenant.weight,
        spec=TrainingSpec.model_validate(job.spec),
        facts=JobFacts(
            job_id=format_id(IdKind.JOB, job.id),
            tenant=tenant.slug,
            model_name=name,
            base_model_id=job.base_model_id,
            base_revision="",
            quantization=job.quantization,
            created_at=int(job.created_at.timestamp()),
            base_license=session.get_one(BaseModelRow, job.base_model_id).license,
        ),
        training_file=grant_file(store, training_file),
        validation_file=grant_file(store, validation_file) if validation_file else None,
        resume_points=tuple(grant_resume_point(store, point) for point in list_resume_points(session, lease)),
    )
