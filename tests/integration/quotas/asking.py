"""Tenants with quotas, and their requests: one, or many at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import Engine, text

from core.db.models import Job
from core.db.session import service_transaction, tenant_transaction
from core.domain.errors import DomainError
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.job_requests import JobRequest
from core.domain.leases import Lease
from core.services import claims
from core.services.files import create_file
from core.services.submissions import submit_job
from tests.factories.bases import BASE_MODEL, POOL
from tests.factories.tenants import Tenant

NUM_AT_ONCE = 20


def limit(owner: Engine, tenant: Tenant, **quotas: float) -> None:
    with service_transaction(owner) as session:
        for name, value in quotas.items():
            session.execute(
                text(f"update tenants set {name} = :value where id = :id"), {"value": value, "id": tenant.id}
            )


def add_file(engine: Engine, tenant: Tenant, *, size_bytes: int = 100, num_examples: int = 4) -> Any:
    file_id = new_id()
    new = NewFile(file_id, "a", "fine-tune", "k", size_bytes, "0" * 64, num_examples=num_examples)
    with tenant_transaction(engine, tenant.id) as session:
        create_file(session, tenant.id, new=new)
    return file_id


def submit(engine: Engine, tenant: Tenant, file_id: Any, **options: Any) -> Job:
    request = JobRequest(base_model_id=BASE_MODEL, training_file_id=file_id, **options)
    with tenant_transaction(engine, tenant.id) as session:
        return submit_job(session, tenant.id, request=request)


def codes_at_once(attempt: Callable[[], object]) -> list[str]:
    def run(_number: int) -> str:
        try:
            attempt()
        except DomainError as error:
            return error.code
        return "ok"

    with ThreadPoolExecutor(NUM_AT_ONCE) as threads:
        return sorted(threads.map(run, range(NUM_AT_ONCE)))


def claim(worker: Engine) -> Job | None:
    with service_transaction(worker) as session:
        return claims.claim_job(session, POOL, worker_name="w", lease_seconds=60)


def act(engine: Engine, tenant: Tenant, verb: Callable[..., Any], **arguments: Any) -> Any:
    """Do one verb of the tenant's in a transaction of its own."""
    with tenant_transaction(engine, tenant.id) as session:
        return verb(session, tenant.id, **arguments)


def must_claim(worker: Engine) -> Lease:
    job = claim(worker)
    assert job is not None
    assert job.lease_token is not None
    return Lease(job.id, job.tenant_id, job.lease_token)
