"""Registers bases, queues jobs on them, and reads the rows afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Engine, func, select, update

from core.db.models import Attempt, BaseModelRow, Event, Job, Pool
from core.db.session import service_transaction
from core.domain.files import NewFile
from core.domain.ids import new_id
from core.domain.job_requests import JobRequest
from core.domain.workers import WorkerFacts
from core.services import claims
from core.services.files import create_file
from core.services.submissions import submit_job
from core.services.workers import record_worker
from core.storage import S3ObjectStore
from tests.factories.bases import BASE_MODEL
from tests.factories.tenants import Tenant
from tests.sessions import any_role_transaction


def place(owner: Engine, directory: Path, **changes: Any) -> None:
    """Register the base anew, as one that nobody has looked at or loaded."""
    source = {"kind": "path", "location": str(directory), "revision": ""}
    fresh = {"state": "unchecked", "state_reason": None, "state_since": func.clock_timestamp(), "checked_by": None}
    with service_transaction(owner) as session:
        session.execute(update(BaseModelRow).values(source=source, **fresh, **changes))
        session.execute(update(Pool).values(load_seconds=None))


def row_of(owner: Engine) -> BaseModelRow:
    with service_transaction(owner) as session:
        return session.scalars(select(BaseModelRow).where(BaseModelRow.id == BASE_MODEL)).one()


def tries_of(owner: Engine, job: Job) -> tuple[str, int, int]:
    with service_transaction(owner) as session:
        row = session.get_one(Job, job.id)
        made = session.scalars(select(Attempt).where(Attempt.job_id == job.id)).all()
        return row.status, row.attempt_count, len(made)


def told(owner: Engine, job: Job) -> list[str]:
    with service_transaction(owner) as session:
        return list(session.scalars(select(Event.message).where(Event.job_id == job.id).order_by(Event.number)))


def trainers() -> set[int]:
    return {child.pid for child in psutil.Process().children() if "worker.trainer" in child.cmdline()}


def show_presence(owner: Engine, facts: WorkerFacts) -> None:
    with service_transaction(owner) as session:
        record_worker(session, facts, alive_seconds=60, is_start=True)


def claimable(owner: Engine) -> set[str]:
    with service_transaction(owner) as session:
        return set(claims.claimable_pools(session))


def queue_real_job(owner: Engine, tenant: Tenant, store: S3ObjectStore, *, base_model_id: str = BASE_MODEL) -> Job:
    """Queue a job of one step on rows that are really stored."""
    rows = [[{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}"}] for n in range(4)]
    content = "\n".join(json.dumps({"messages": row}) for row in rows).encode()
    file_id = new_id()
    stored = store.put_bytes(f"tenants/{tenant.id}/files/{file_id}", content, content_type="application/jsonl")
    new = NewFile(
        id=file_id,
        filename="rows.jsonl",
        purpose="fine-tune",
        object_key=f"tenants/{tenant.id}/files/{file_id}",
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        num_examples=len(rows),
    )
    request = JobRequest(base_model_id=base_model_id, training_file_id=file_id, n_epochs=1, batch_size=4, rank=4)
    with any_role_transaction(owner) as session:
        create_file(session, tenant.id, new=new)
        return submit_job(session, tenant.id, request=request)


def copy_base(owner: Engine, base_model_id: str, directory: Path) -> str:
    with service_transaction(owner) as session:
        session.connection().exec_driver_sql(
            "insert into base_models (id, source, dtype, quantizations, target_modules, max_seq_len, max_rank, slots, "
            "max_tokens_per_step) select %s, jsonb_set(source, '{location}', to_jsonb(%s::text)), dtype, '{}', "
            "target_modules, max_seq_len, max_rank, slots, max_tokens_per_step from base_models limit 1",
            (base_model_id, str(directory)),
        )
    return base_model_id
