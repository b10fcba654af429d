"""Arranges tenants that hold, use and lend slots, and asks which pool is next."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from sqlalchemy import Engine, text

from core.db.models import Tenant as TenantRow
from core.db.session import service_transaction
from core.domain.leases import Lease
from core.domain.workers import WorkerFacts
from core.services import claims, turns
from core.services.resume_points import begin_steps
from core.services.turns import Loan, PoolChoice, SlotTerms
from core.services.workers import record_worker
from tests.factories.bases import NF4_POOL, POOL
from tests.factories.jobs import queue_job, record_step
from tests.factories.tenants import Tenant

TERMS = SlotTerms(quantum_seconds=600.0, slot_seconds=75.0)


def claim(engine: Engine, pool: str = POOL, **how: object) -> Lease:
    with service_transaction(engine) as session:
        job = claims.claim_job(session, pool, worker_name="w", lease_seconds=3600, **how)  # type: ignore[arg-type]
    assert job is not None
    assert job.lease_token is not None
    return Lease(job.id, job.tenant_id, job.lease_token)


def train(owner: Engine, lease: Lease, *, steps: int = 1, seconds_ago: float = 0.0) -> None:
    """Let an attempt begin to step, so long ago, and do some steps."""
    with service_transaction(owner) as session:
        begin_steps(session, lease, step=0, total_steps=20_000)
    for step in range(1, steps + 1):
        record_step(owner, lease, step)
    change = "update attempts set stepping_at = now() - make_interval(secs => :ago) where lease_token = :token"
    with service_transaction(owner) as session:
        session.execute(text(change), {"ago": seconds_ago, "token": lease.token})


def hold_slots(owner: Engine, worker: Engine, tenant: Tenant, *, count: int, seconds_ago: float) -> list[Lease]:
    for _ in range(count):
        queue_job(owner, tenant)
    leases = [claim(worker) for _ in range(count)]
    for lease in leases:
        train(owner, lease, seconds_ago=seconds_ago)
    return leases


def set_usage(owner: Engine, tenant: Tenant, usage: float, **values: float) -> None:
    with service_transaction(owner) as session:
        row = session.get_one(TenantRow, tenant.id)
        row.usage_seconds, row.lift_seconds = usage, 0.0
        for name, value in values.items():
            setattr(row, name, value)


def lend(worker: Engine, held: Sequence[Lease]) -> int | None:
    loan = lend_to(worker, held, wanting=[])
    return loan.lease_token if loan is not None else None


def lend_to(worker: Engine, held: Sequence[Lease], *, wanting: Sequence[Lease]) -> Loan | None:
    tokens, wanted = ([lease.token for lease in leases] for leases in (held, wanting))
    with service_transaction(worker) as session:
        return turns.lend_slot(session, POOL, worker_name="w", held=tokens, terms=TERMS, wanting=wanted)


def choose(worker: Engine, *, pool: str | None, keeps_pool: bool, holders: Sequence[uuid.UUID] = ()) -> str | None:
    choice = PoolChoice("w", (POOL, NF4_POOL), pool, keeps_pool=keeps_pool, holders=tuple(holders))
    with service_transaction(worker) as session:
        return turns.choose_pool(session, choice)


def add_worker(owner: Engine, facts: WorkerFacts) -> None:
    with service_transaction(owner) as session:
        record_worker(session, facts, alive_seconds=60, is_start=True)
