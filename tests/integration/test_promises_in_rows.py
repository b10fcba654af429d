"""The checks of promises in rows name violations, and nothing else."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, text

from core.db.session import service_transaction
from core.domain.leases import Lease
from core.domain.scheduling import FairnessTerms
from core.services.promises import check_rows
from tests.factories.jobs import fail_job, record_step, start_job
from tests.factories.tenants import Tenant
from tests.sessions import any_role_transaction

STEP = """
    insert into metrics (job_id, tenant_id, step, lease_token, train_loss, train_accuracy, learning_rate, grad_norm,
        num_tokens)
    values (:job, :tenant, :step, :token, 1, 1, 1, 1, 1)
"""
LATER = {
    "a step": "update metrics set created_at = now() + interval '1 minute' where job_id = :job and step = 2",
    "an attempt": "update attempts set started_at = now() + interval '1 minute' where job_id = :job",
    "an open attempt": "update attempts set outcome = null, ended_at = null where job_id = :job",
    "an adapter": """
        insert into adapters (id, tenant_id, job_id, name, base_model_id, object_prefix, files, size_bytes, created_at)
        select gen_random_uuid(), tenant_id, id, 'ft:' || id, base_model_id, 'p', '[]', 1, now() + interval '1 minute'
        from jobs where id = :job""",
}


def broken(owner: Engine, promise: str) -> tuple[str, ...]:
    with any_role_transaction(owner) as session:
        (finding,) = (each for each in check_rows(session, FairnessTerms()) if each.promise == promise)
    return finding.broken


def change(owner: Engine, statement: str, lease: Lease, **values: int) -> None:
    with service_transaction(owner) as session:
        session.execute(text("set local session_replication_role = replica"))
        session.execute(text(statement), {"job": lease.job_id, **values})


def test_a_step_that_an_older_attempt_wrote_behind_a_newer_one_is_named(owner: Engine, tenant: Tenant) -> None:
    kept, lease = start_job(owner, tenant), start_job(owner, tenant)
    written_by = {1: 0, 2: 5, 3: 0, 4: 5, 5: 7, 6: 2}  # steps, and the fence behind the job's own
    with service_transaction(owner) as session:
        for step, fence in written_by.items():
            values = {"tenant": lease.tenant_id, "step": step, "token": lease.token + fence}
            session.execute(text(STEP), {"job": lease.job_id, **values})
            session.execute(text(STEP), {"job": kept.job_id, **values, "token": kept.token + step // 3})
    assert sorted(broken(owner, "I3")) == [f"step {step} of job {lease.job_id}" for step in (3, 6)]
    change(owner, "delete from metrics where job_id = :job", lease)
    assert broken(owner, "I3") == ()


@pytest.mark.parametrize("what", LATER)
def test_what_was_written_of_a_job_after_its_end_is_named(owner: Engine, tenant: Tenant, what: str) -> None:
    kept, lease = start_job(owner, tenant), start_job(owner, tenant)
    for each in (kept, lease):
        for step in (1, 2, 3):
            record_step(owner, each, step)
        fail_job(owner, each)
    assert broken(owner, "I4") == ()
    change(owner, LATER[what], lease)
    assert broken(owner, "I4") == (f"job {lease.job_id}",)
    for table, column in {"adapters": "job_id", "jobs": "id"}.items():
        change(owner, f"delete from {table} where {column} = :job", lease)
