"""Why a job waits, its place among the jobs of all tenants, and when it may end."""

from __future__ import annotations

import random
import time
import uuid
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import ProgrammingError

from core.db.session import service_transaction, tenant_transaction
from core.domain.bases import BaseState
from core.domain.failures import Failure
from core.domain.ids import IdKind, format_id
from core.domain.workers import WorkerFacts
from core.services import attempts, claims, observations, turns
from core.services.base_models import record_state
from core.services.jobs import pause_job
from core.services.resume_points import begin_steps
from core.services.workers import record_worker
from tests.factories.bases import BASE_MODEL, POOL
from tests.factories.jobs import fail_job, queue_job, record_step, start_job
from tests.factories.tenants import Tenant, add_tenant
from tests.sessions import any_role_transaction
from tests.waiting import PATIENCE_SECONDS


@pytest.fixture(autouse=True)
def empty(owner: Engine) -> None:
    with service_transaction(owner) as session:
        session.execute(text("truncate jobs, workers cascade"))
        session.execute(text("update tenants set usage = 0"))


def explain(api_url: str, tenant: Tenant, job_id: uuid.UUID) -> dict[str, Any]:
    return dict(get(api_url, tenant, f"/{format_id(IdKind.JOB, job_id)}/explain").json())


def get(api_url: str, tenant: Tenant, path: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    return httpx.get(f"{api_url}/v1/fine_tuning/jobs{path}", headers=headers, trust_env=False, timeout=PATIENCE_SECONDS)


def add_worker(owner: Engine, facts: WorkerFacts, *, alive_seconds: float = 60) -> None:
    with service_transaction(owner) as session:
        record_worker(session, facts, alive_seconds=alive_seconds, is_start=True)


def test_the_reason_follows_what_workers_say_of_themselves(api_url: str, owner: Engine, tenant: Tenant) -> None:
    job = queue_job(owner, tenant)
    told = explain(api_url, tenant, job.id)
    assert (told["status"], told["reason"]["code"], told["eta"]) == ("queued", "no_worker", None)
    assert told["workers"] == {
        "num_alive": 0, "num_serving": 0, "num_loading": 0, "slots": 0, "slots_in_use": 0, "last_seen_at": None,
    }  # fmt: skip
    for state, code in (
        (WorkerFacts("w", (POOL,), "idle"), "base_loading"),
        (WorkerFacts("w", (POOL,), "loading", POOL, 4, 0), "base_loading"),
        (WorkerFacts("w", (POOL, "x"), "serving", "x", 4, 4), "other_base_turn"),
        (WorkerFacts("w", (POOL,), "serving", POOL, 4, 4), "no_free_slot"),
        (WorkerFacts("w", (POOL,), "serving", POOL, 4, 3), "starting"),
        (WorkerFacts("w", (POOL,), "stopping", POOL, 4, 3), "no_worker"),
        (WorkerFacts("w", ("x",), "idle"), "no_worker"),
        (WorkerFacts("w", (POOL,), "serving", POOL, 4, 3, is_clock_wrong=True), "clock_wrong"),
        (WorkerFacts("w", ("x",), "idle", is_clock_wrong=True), "no_worker"),
    ):
        add_worker(owner, state)
        assert explain(api_url, tenant, job.id)["reason"]["code"] == code
    add_worker(owner, WorkerFacts("w", (POOL,), "serving", POOL, 4, 3), alive_seconds=-1)
    stale = explain(api_url, tenant, job.id)
    assert (stale["reason"]["code"], stale["workers"]["num_alive"]) == ("no_worker", 0)
    assert abs(stale["workers"]["last_seen_at"] - time.time()) < PATIENCE_SECONDS


def test_a_base_that_cannot_be_used_is_said_to_be_so_without_a_word_of_the_workers_files(
    api_url: str, owner: Engine, tenant: Tenant
) -> None:
    def find(state: BaseState, reason: str | None) -> None:
        with service_transaction(owner) as session:
            record_state(session, BASE_MODEL, state=state, reason=reason, by="w")

    job = queue_job(owner, tenant)
    refusal = "OSError: No space left on device: '/cache'"
    add_worker(owner, WorkerFacts("w", (POOL,), "idle", refusals={POOL: refusal}))
    told = explain(api_url, tenant, job.id)
    assert (told["reason"]["code"], told["workers"]["num_alive"], told["eta"]) == ("no_worker", 0, None)
    assert "none can load it at present" in told["reason"]["message"]
    find(BaseState.UNUSABLE, "There is no base model at /models/x.")
    try:
        unusable = explain(api_url, tenant, job.id)
    finally:
        find(BaseState.UNCHECKED, None)
    assert (unusable["reason"]["code"], unusable["eta"]) == ("base_unusable", None)
    assert "/" not in told["reason"]["message"] + unusable["reason"]["message"]
    add_worker(owner, WorkerFacts("w", (POOL,), "idle"))
    assert explain(api_url, tenant, job.id)["reason"]["code"] == "base_loading"


def test_quota_and_backoff_come_before_the_workers(api_url: str, owner: Engine, tenant: Tenant) -> None:
    lease = start_job(owner, tenant)
    with service_transaction(owner) as session:
        attempts.fail_attempt(
            session, lease, failure=Failure(code="trainer_crashed", message="It crashed."), is_job_fault=False
        )
    told = explain(api_url, tenant, lease.job_id)
    assert told["reason"]["code"] == "retry_backoff"
    start_job(owner, tenant)
    with service_transaction(owner) as session:
        session.execute(text("update tenants set max_running = 1 where id = :id"), {"id": tenant.id})
    told = explain(api_url, tenant, queue_job(owner, tenant).id)
    assert told["reason"]["code"] == "tenant_concurrency"
    assert (told["share"]["num_running"], told["share"]["max_running"]) == (1, 1)


def test_others_jobs_are_not_found_and_ended_ones_wait_for_nothing(
    api_url: str, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    lease = start_job(owner, tenant)
    assert get(api_url, other_tenant, f"/{format_id(IdKind.JOB, lease.job_id)}/explain").status_code == 404
    fail_job(owner, lease)
    told = explain(api_url, tenant, lease.job_id)
    assert (told["status"], told["reason"], told["place"], told["eta"]) == ("failed", None, None, None)


def test_the_outlook_answers_about_the_transactions_own_tenant_alone(
    api: Engine, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    job = queue_job(owner, tenant)
    query = text("select num_ahead from pool_outlook(:pool, :job, 21600, 60)")
    for asker, expected in ((tenant, 1), (other_tenant, 0)):
        with tenant_transaction(api, asker.id) as session:
            assert len(session.execute(query, {"pool": POOL, "job": job.id}).all()) == expected
    with service_transaction(api) as session:
        assert session.execute(query, {"pool": POOL, "job": job.id}).all() == []
    with pytest.raises(ProgrammingError, match="permission denied"), service_transaction(api) as session:
        session.execute(text("set role espalier_outlook"))


@pytest.mark.parametrize("seed", range(4))
def test_the_place_told_is_the_place_at_which_the_job_is_claimed(api_url: str, owner: Engine, seed: int) -> None:
    """Tenants of random weights, usages, quotas and numbers of jobs; every job is told its place, then all are claimed."""
    rng = random.Random(seed)
    tenants = [add_tenant(owner) for _ in range(5)]
    jobs = {}
    with service_transaction(owner) as session:
        for each in tenants:
            numbers = {"id": each.id, "weight": rng.choice([0.5, 1, 3]), "usage": rng.uniform(0, 300)}
            session.execute(text("update tenants set weight = :weight, usage = :usage where id = :id"), numbers)
            session.execute(text("update tenants set max_running = 1000 where id = :id"), {"id": each.id})
    for each in tenants:
        for _ in range(rng.randint(0, 6)):
            jobs[queue_job(owner, each, priority=rng.choice([0, 0, 5])).id] = each
    told = {job_id: explain(api_url, each, job_id) for job_id, each in jobs.items()}
    claimed = []
    while True:
        with service_transaction(owner) as session:
            job = claims.claim_job(session, POOL, worker_name="w", lease_seconds=60)
        if job is None:
            break
        claimed.append(job.id)
    assert [told[job_id]["place"]["position"] for job_id in claimed] == list(range(1, len(jobs) + 1))
    assert {each["place"]["num_waiting"] for each in told.values()} == {len(jobs)}
    shares = {each.id: told[job_id]["share"] for job_id, each in jobs.items()}
    assert sum(share["entitled"] for share in shares.values()) == pytest.approx(1)
    assert sum(share["now"] for share in shares.values()) == pytest.approx(1)


def test_a_running_job_has_an_interval_from_its_own_steps(api_url: str, owner: Engine, tenant: Tenant) -> None:
    lease = start_job(owner, tenant)
    for step in range(1, 5):
        record_step(owner, lease, step)
    with service_transaction(owner) as session:
        session.execute(text("update jobs set total_steps = 104 where id = :id"), {"id": lease.job_id})
        spread = "update metrics set created_at = now() - (4 - step) * interval '10 s' where job_id = :id"
        session.execute(text(spread), {"id": lease.job_id})
    before = time.time() - 60  # the last step may have been a while ago on a busy machine
    job = get(api_url, tenant, f"/{format_id(IdKind.JOB, lease.job_id)}").json()
    assert job["progress"] == pytest.approx(4 / 104)
    interval = job["estimated_finish_interval"]
    instants = (interval["earliest"], job["estimated_finish"], interval["latest"])
    lefts = zip((500, 1000, 2000), instants, strict=True)
    assert all(before + left <= at <= time.time() + left + 1 for left, at in lefts)
    told = explain(api_url, tenant, lease.job_id)
    assert (told["status"], told["reason"], told["eta"]["basis"]) == ("running", None, "measured_steps")
    assert told["eta"]["num_measured"] == 3
    listed = get(api_url, tenant, "?limit=1").json()
    assert listed["data"][0]["estimated_finish"] == job["estimated_finish"]


def test_a_job_that_pauses_says_so_wherever_it_is_shown_and_promises_no_end(
    api_url: str, owner: Engine, tenant: Tenant
) -> None:
    lease = start_job(owner, tenant)
    for step in range(1, 5):
        record_step(owner, lease, step)
    path = f"/{format_id(IdKind.JOB, lease.job_id)}"
    assert get(api_url, tenant, path).json()["is_pausing"] is False
    with any_role_transaction(owner) as session:
        pause_job(session, tenant.id, job_id=lease.job_id)
    job = get(api_url, tenant, path).json()
    assert (job["status"], job["is_pausing"], job["estimated_finish"]) == ("running", True, None)
    told = explain(api_url, tenant, lease.job_id)
    assert (told["reason"]["code"], told["eta"], told["place"]) == ("pausing", None, None)
    assert "resume it" in told["reason"]["message"]
    events = get(api_url, tenant, f"{path}/events").json()["data"]
    assert events[0]["message"] == "The job pauses at its next resume point."
    with service_transaction(owner) as session:
        attempts.requeue_attempt(session, lease)
    job = get(api_url, tenant, path).json()
    assert (job["status"], job["is_pausing"]) == ("paused", False)
    assert explain(api_url, tenant, lease.job_id)["reason"]["code"] == "paused"


def test_skipped_steps_are_shown_and_count_in_progress_and_in_the_pace(
    api_url: str, owner: Engine, tenant: Tenant
) -> None:
    """Ten seconds a step, and every other step skipped: 100 steps to go take 1,000 s, and not 2,000."""
    lease = start_job(owner, tenant)
    with service_transaction(owner) as session:
        begin_steps(session, lease, step=0, total_steps=120)
    for step in range(1, 21):
        if step % 2:
            with service_transaction(owner) as session:
                observations.record_skipped_step(session, lease, step=step, total_steps=120)
        else:
            record_step(owner, lease, step)
    spread = "update metrics set created_at = now() - (20 - step) * interval '10 s' where job_id = :id"
    with service_transaction(owner) as session:
        session.execute(text(spread), {"id": lease.job_id})
    before = time.time() - 60
    job = get(api_url, tenant, f"/{format_id(IdKind.JOB, lease.job_id)}").json()
    assert (job["trained_steps"], job["skipped_steps"], job["total_steps"]) == (20, 10, 120)
    assert job["progress"] == pytest.approx(20 / 120)
    assert before + 1000 <= job["estimated_finish"] <= time.time() + 1001
    eta = explain(api_url, tenant, lease.job_id)["eta"]
    assert (eta["num_measured"], eta["latest"]) == (18, job["estimated_finish_interval"]["latest"])


def test_a_wait_behind_a_job_that_skips_steps_is_of_its_steps_and_not_of_their_numbers(
    api_url: str, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    plant_recent_job(owner, other_tenant)
    plant_running_job(owner, other_tenant, num_steps=6)
    with service_transaction(owner) as session:
        session.execute(
            text("delete from metrics m using jobs j where j.id = m.job_id and status = 'running' and step % 2 = 1")
        )
        session.execute(text("update tenants set usage = 0"))
    job = queue_job(owner, tenant)
    add_worker(owner, WorkerFacts("w", (POOL,), "serving", POOL, 1, 1))
    told = explain(api_url, tenant, job.id)
    assert told["eta"]["earliest"] == pytest.approx(time.time() + 750 + 30, abs=PATIENCE_SECONDS)


def test_the_file_at_fault_is_in_the_error(api_url: str, owner: Engine, tenant: Tenant) -> None:
    lease = start_job(owner, tenant)
    words = "Line 2 of the validation file: It is not JSON."
    with service_transaction(owner) as session:
        attempts.fail_attempt(
            session,
            lease,
            failure=Failure(code="invalid_training_data", message=words, param="validation_file"),
            is_job_fault=True,
        )
    path = f"/{format_id(IdKind.JOB, lease.job_id)}"
    error = get(api_url, tenant, path).json()["error"]
    assert error == {"code": "invalid_training_data", "message": words, "param": "validation_file"}
    assert get(api_url, tenant, f"{path}/events").json()["data"][0]["message"] == f"The job has failed: {words}"


def test_a_queued_job_has_an_interval_from_what_recent_jobs_took(
    api_url: str, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    job = queue_job(owner, tenant)
    add_worker(owner, WorkerFacts("w", (POOL,), "serving", POOL, 4, 3))
    assert explain(api_url, tenant, job.id)["eta"] is None
    ended = """
        update attempts set outcome = 'succeeded', ended_at = now(), started_at = now() - interval '30 s'
    """
    start_job(owner, other_tenant)
    with service_transaction(owner) as session:
        session.execute(text(ended))
        session.execute(text("update jobs set run_after = now()"))
    before = time.time() - 1  # answers are in whole seconds
    told = explain(api_url, tenant, job.id)
    assert (told["reason"]["code"], told["eta"]["basis"], told["eta"]["num_measured"]) == ("starting", "recent_jobs", 1)
    assert before + 30 <= told["eta"]["earliest"] <= time.time() + 30 + 1


def plant_recent_job(owner: Engine, tenant: Tenant) -> None:
    """A job of the pool that took 30 s."""
    lease = start_job(owner, tenant)
    ended = "update attempts set outcome = 'succeeded', ended_at = now(), started_at = now() - interval '30 s' where lease_token = :token"
    with service_transaction(owner) as session:
        session.execute(text(ended), {"token": lease.token})
        session.execute(text("update jobs set status = 'paused', lease_token = null, lease_until = null"))


def plant_running_job(owner: Engine, tenant: Tenant, *, num_steps: int) -> None:
    """A job with 100 steps to go, of 10 s each as far as it has done any."""
    lease = start_job(owner, tenant)
    for step in range(1, num_steps + 1):
        record_step(owner, lease, step)
    values = {"id": lease.job_id, "total": num_steps + 100}
    with service_transaction(owner) as session:
        session.execute(text("update jobs set total_steps = :total where id = :id"), values)
        spread = "update metrics set created_at = now() - (trained_steps - step) * interval '10 s' from jobs j where job_id = j.id and j.id = :id"
        session.execute(text(spread), values)
        session.execute(text("update jobs set run_after = now()"))


def test_a_wait_for_a_slot_follows_from_the_remaining_steps_of_what_runs(
    api_url: str, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    plant_recent_job(owner, other_tenant)
    plant_running_job(owner, other_tenant, num_steps=5)
    with service_transaction(owner) as session:
        session.execute(text("update tenants set usage = 0"))  # nobody is above anybody, and nothing is lent
    job = queue_job(owner, tenant)
    add_worker(owner, WorkerFacts("w", (POOL,), "serving", POOL, 1, 1))
    told = explain(api_url, tenant, job.id)
    assert told["reason"]["code"] == "no_free_slot"
    now = time.time()
    assert told["eta"]["earliest"] == pytest.approx(now + 750 + 30, abs=PATIENCE_SECONDS)
    assert told["eta"]["latest"] == pytest.approx(now + 1250 + 30, abs=PATIENCE_SECONDS)
    assert told["eta"]["latest"] - told["eta"]["earliest"] == pytest.approx(500, abs=5)
    with service_transaction(owner) as session:
        session.execute(text("update tenants set usage = 1e5 where id = :id"), {"id": other_tenant.id})
    lent = explain(api_url, tenant, job.id)["eta"]
    assert lent["latest"] - told["eta"]["latest"] == pytest.approx(600 - 1250, abs=PATIENCE_SECONDS), "a quantum"


def test_nothing_is_promised_behind_a_job_whose_pace_nobody_knows(
    api_url: str, owner: Engine, tenant: Tenant, other_tenant: Tenant
) -> None:
    """What was seen: 30 to 77 s were promised, again and again, where 20 days were to come."""
    plant_recent_job(owner, other_tenant)
    plant_running_job(owner, other_tenant, num_steps=1)
    with service_transaction(owner) as session:
        session.execute(text("update tenants set usage = 0"))
    job = queue_job(owner, tenant)
    add_worker(owner, WorkerFacts("w", (POOL,), "serving", POOL, 1, 1))
    told = explain(api_url, tenant, job.id)
    assert (told["reason"]["code"], told["eta"]) == ("no_free_slot", None)


def test_a_lent_slot_and_another_bases_turn_have_codes_and_the_turn_an_end(
    api_url: str, owner: Engine, tenant: Tenant
) -> None:
    lease = start_job(owner, tenant)
    with service_transaction(owner) as session:
        turns.mark_lending(session, [lease.token])
        attempts.requeue_attempt(session, lease)
    add_worker(owner, WorkerFacts("w", (POOL,), "serving", POOL, 4, 4))
    assert explain(api_url, tenant, lease.job_id)["reason"]["code"] == "slot_lent"
    add_worker(owner, WorkerFacts("w", (POOL, "x"), "serving", "x", 4, 4, pool_seconds=300.0))
    told = explain(api_url, tenant, lease.job_id)["reason"]
    assert told["code"] == "other_base_turn"
    assert "ends in 10 min" in told["message"]


def test_a_job_whose_terms_cannot_be_read_hides_no_other_from_its_tenant(
    api_url: str, owner: Engine, tenant: Tenant
) -> None:
    unreadable, sound = queue_job(owner, tenant), queue_job(owner, tenant)
    with service_transaction(owner) as session:
        session.execute(text("update jobs set spec = '{}' where id = :id"), {"id": unreadable.id})
    listed = get(api_url, tenant, "?limit=10").raise_for_status().json()["data"]
    assert [job["id"] for job in listed] == [format_id(IdKind.JOB, job.id) for job in (sound, unreadable)]
    assert [job["hyperparameters"]["n_epochs"] > 0 for job in listed] == [True, False]
    assert get(api_url, tenant, f"/{format_id(IdKind.JOB, unreadable.id)}").is_success
