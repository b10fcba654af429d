"""Quotas of jobs, tokens and GPU-seconds hold exactly for any number of simultaneous requests."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, event, func, select, text

from core.db.models import Attempt, Job, Usage
from core.db.session import service_transaction, tenant_transaction
from core.domain.errors import DomainError, RateLimitedError
from core.domain.ids import new_id
from core.domain.outlook import WaitCode
from core.domain.scheduling import FairnessTerms
from core.services import attempts
from core.services.explanations import explain_job
from core.services.jobs import cancel_job, pause_job, resume_job
from core.services.quotas import reserve_storage
from tests.factories.bases import BASE_MODEL
from tests.factories.tenants import Tenant
from tests.integration.quotas.asking import NUM_AT_ONCE, act, add_file, claim, codes_at_once, limit, must_claim, submit


def test_twenty_submits_at_once_take_the_one_place_that_is_left(api: Engine, owner: Engine, tenant: Tenant) -> None:
    limit(owner, tenant, max_queued=3)
    file_id = add_file(api, tenant)
    for _ in range(2):
        submit(api, tenant, file_id)
    codes = codes_at_once(lambda: submit(api, tenant, file_id))
    assert codes == ["ok", *["queue_quota_exceeded"] * (NUM_AT_ONCE - 1)][::-1] or codes.count("ok") == 1
    assert set(codes) == {"ok", "queue_quota_exceeded"}
    with tenant_transaction(api, tenant.id) as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 3


def test_many_submits_at_once_over_the_wire_are_all_answered(
    api_url: str, api: Engine, owner: Engine, tenant: Tenant
) -> None:
    """More than the threads of the API, all after one lock: whoever holds it needs no further thread to let go."""
    limit(owner, tenant, max_queued=5)
    file_id = add_file(api, tenant)
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    body = {"model": BASE_MODEL, "training_file": f"file-{file_id.hex}"}

    def post(_number: int) -> int:
        return httpx.post(
            f"{api_url}/v1/fine_tuning/jobs", headers=headers, json=body, timeout=60, trust_env=False
        ).status_code

    with ThreadPoolExecutor(60) as threads:
        statuses = list(threads.map(post, range(60)))
    assert (statuses.count(200), statuses.count(429)) == (5, 55)


def test_a_job_that_may_train_more_tokens_than_the_quota_is_refused(api: Engine, owner: Engine, tenant: Tenant) -> None:
    limit(owner, tenant, max_tokens_per_job=1000)
    by_length = add_file(api, tenant, size_bytes=10**6, num_examples=2)
    submit(api, tenant, by_length, n_epochs=1)  # 2 rows of at most 256 tokens
    with pytest.raises(DomainError, match="up to 1024 tokens") as refused:
        submit(api, tenant, by_length, n_epochs=2)
    assert refused.value.code == "token_quota_exceeded"
    by_bytes = add_file(api, tenant, size_bytes=100, num_examples=4)
    submit(api, tenant, by_bytes, n_epochs=2)
    with pytest.raises(DomainError, match="up to 1068 tokens"):
        submit(api, tenant, by_bytes, n_epochs=3)


def test_a_tenant_that_has_used_its_gpu_seconds_of_the_month_waits_and_loses_nothing(
    api: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    file_id = add_file(api, tenant)
    for _ in range(2):
        submit(api, tenant, file_id)
    first = claim(worker)
    assert first is not None
    with service_transaction(owner) as session:
        attempt_id = session.scalars(select(Attempt.id).where(Attempt.job_id == first.id)).one()
        session.add(Usage(id=new_id(), tenant_id=tenant.id, attempt_id=attempt_id, gpu_seconds=100, trained_tokens=1))
    limit(owner, tenant, max_gpu_seconds_per_month=100)
    assert claim(worker) is None
    with tenant_transaction(api, tenant.id) as session:
        waiting = session.scalars(select(Job.id).where(Job.status == "queued")).one()
        told = explain_job(session, tenant.id, job_id=waiting, now=dt.datetime.now(dt.UTC), terms=FairnessTerms())
    assert told.reason is not None
    assert told.reason.code == WaitCode.QUOTA
    with service_transaction(owner) as session:
        session.execute(text("update usage set created_at = date_trunc('month', now(), 'UTC') - interval '1 second'"))
    second = claim(worker)
    assert second is not None
    assert second.tenant_id == tenant.id


def test_a_tenant_without_quotas_asks_nothing_of_them(api: Engine, tenant: Tenant) -> None:
    with tenant_transaction(api, tenant.id) as session:
        reserve_storage(session, tenant.id, num_bytes=2**60)
    submit(api, tenant, add_file(api, tenant, size_bytes=2**40, num_examples=10**6))


def test_a_refused_submit_leaves_its_place_free(api: Engine, owner: Engine, tenant: Tenant) -> None:
    limit(owner, tenant, max_queued=1)
    file_id = add_file(api, tenant)
    submit(api, tenant, file_id)
    with pytest.raises(RateLimitedError):
        submit(api, tenant, file_id)
    limit(owner, tenant, max_queued=2)
    submit(api, tenant, file_id)


def test_a_paused_job_keeps_its_place_in_the_queue(api: Engine, owner: Engine, tenant: Tenant) -> None:
    limit(owner, tenant, max_queued=2)
    file_id = add_file(api, tenant)
    jobs = [submit(api, tenant, file_id) for _ in range(2)]
    for job in jobs:
        act(api, tenant, pause_job, job_id=job.id)
    with pytest.raises(RateLimitedError, match="2 jobs wait, queued or paused, of 2 that may"):
        submit(api, tenant, file_id)
    act(api, tenant, resume_job, job_id=jobs[0].id)
    act(api, tenant, cancel_job, job_id=jobs[1].id)
    submit(api, tenant, file_id)


def test_a_running_job_is_paused_only_where_it_has_a_place_to_wait(
    api: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    limit(owner, tenant, max_queued=1)
    file_id = add_file(api, tenant)
    running = submit(api, tenant, file_id)
    lease = must_claim(worker)
    waiting = submit(api, tenant, file_id)
    with pytest.raises(RateLimitedError) as refused:
        act(api, tenant, pause_job, job_id=running.id)
    assert refused.value.code == "queue_quota_exceeded"
    act(api, tenant, cancel_job, job_id=waiting.id)
    for _ in range(2):
        act(api, tenant, pause_job, job_id=running.id)
    with pytest.raises(RateLimitedError):
        submit(api, tenant, file_id)  # the place is the pausing job's from now on
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, lease)
    with pytest.raises(RateLimitedError):
        submit(api, tenant, file_id)
    act(api, tenant, resume_job, job_id=running.id)
    must_claim(worker)
    submit(api, tenant, file_id)


def test_a_job_that_its_worker_gives_back_has_a_place_whatever_the_quota(
    api: Engine, worker: Engine, owner: Engine, tenant: Tenant
) -> None:
    limit(owner, tenant, max_queued=1)
    file_id = add_file(api, tenant)
    submit(api, tenant, file_id)
    lease = must_claim(worker)
    submit(api, tenant, file_id)
    with service_transaction(worker) as session:
        attempts.requeue_attempt(session, lease)
    with pytest.raises(RateLimitedError, match="2 jobs wait"):
        submit(api, tenant, file_id)


def test_quotas_cost_a_submission_no_round_trip_and_an_upload_two(api: Engine, owner: Engine, tenant: Tenant) -> None:
    limit(owner, tenant, max_storage_bytes=10**6)
    file_id = add_file(api, tenant)
    submit(api, tenant, file_id)
    assert count_statements(api, lambda: submit(api, tenant, file_id)) == 3  # the means, the lock, the job
    assert count_statements(api, lambda: act(api, tenant, reserve_storage, num_bytes=1)) == 2  # the lock, the total


def count_statements(engine: Engine, do: Callable[[], Any]) -> int:
    statements: list[Any] = []

    def note(*told: Any) -> None:
        statements.append(told)

    event.listen(engine, "before_cursor_execute", note)
    do()
    event.remove(engine, "before_cursor_execute", note)
    return len(statements)
