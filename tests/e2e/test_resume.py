"""Jobs resume where they were, after a kill, a preemption or a pause, on whichever worker comes next."""

from __future__ import annotations

import pytest

from tests.e2e.lab import LONG, Lab
from tests.faults import Hang
from tests.waiting import wait_until


@pytest.mark.fault(1)
def test_01_a_worker_killed_in_the_middle_is_replaced_and_the_adapter_is_bitwise_the_same(lab: Lab) -> None:
    whole = lab.submit(**LONG)
    lab.ensure_worker()
    expected = lab.succeed(whole)
    broken = lab.submit(**LONG)
    point = lab.rows.wait_for_resume_point(broken)
    lab.rows.wait_for_step(broken, point + 2)
    (worker,) = lab.workers
    worker.kill()
    held_until = lab.rows.lease_end(broken)
    lab.start_worker()
    wait_until(lambda: lab.rows.has_said(broken, "The worker was lost"))
    assert lab.rows.attempt_end(broken) >= held_until, "nobody takes what is still held"
    assert lab.succeed(broken) == expected
    assert lab.rows.has_said(broken, "Resumed from step ")
    assert lab.rows.metric_steps(broken) == list(range(1, 81))
    assert lab.rows.outcomes(broken) == ["lost", "succeeded"]


@pytest.mark.fault(2)
def test_02_a_trainer_killed_alone_is_reported_at_once_and_charged(lab: Lab) -> None:
    job_id = lab.submit(**LONG)
    worker = lab.ensure_worker()
    lab.rows.wait_for_resume_point(job_id)
    lab.trainer_of(worker).kill()
    wait_until(lambda: lab.rows.has_said(job_id, "The trainer process was killed"))
    assert lab.rows.outcomes(job_id)[0] == "failed", "its worker has told of it: nobody waits for the end of the lease"
    assert lab.rows.attempt_count(job_id) == 1
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == ["failed", "succeeded"]
    assert lab.rows.has_said(job_id, "Resumed from step ")


@pytest.mark.fault(30)
def test_30_a_preempted_worker_stores_its_slots_gives_them_back_and_is_told_only_once(lab: Lab) -> None:
    worker = lab.ensure_worker()
    with lab.rows.claims_held():  # neither is done before the other has begun
        job_ids = [lab.submit(**LONG, seed=seed) for seed in (1, 2)]
    for job_id in job_ids:
        lab.rows.wait_for_step(job_id, 3)
    for _ in range(2):
        worker.ask_to_stop()
    wait_until(lambda: not worker.is_alive, what="the worker's own end")
    worker.stop()  # and all that it said is in its log
    assert "job.left_without_state" not in worker.log_path.read_text(), "everything was stored within the grace"
    for job_id in job_ids:
        assert (lab.job(job_id).status, lab.rows.attempt_count(job_id)) == ("queued", 0)
        assert lab.rows.outcomes(job_id) == ["preempted"]
    stored = {job_id: lab.rows.wait_for_resume_point(job_id) for job_id in job_ids}
    assert all(lab.rows.metric_steps(job_id)[-1] == stored[job_id] for job_id in job_ids), "no step is taken twice"
    lab.start_worker()
    for job_id in job_ids:
        lab.succeed(job_id)
        assert lab.rows.has_said(job_id, f"Resumed from step {stored[job_id]}.")


@pytest.mark.fault(32)
def test_32_a_worker_killed_at_the_end_of_its_grace_is_a_worker_killed(lab: Lab) -> None:
    job_id = lab.submit(**LONG)
    worker = lab.ensure_worker()
    lab.rows.wait_for_resume_point(job_id)
    s3 = lab.servers.s3
    with s3.during(Hang()):  # nothing can be stored within the grace
        hits = s3.num_hits
        worker.ask_to_stop()
        wait_until(lambda: s3.num_hits > hits, what="something that cannot be stored")
        worker.kill()
    lab.start_worker()
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == ["lost", "succeeded"]


def test_a_paused_job_frees_its_slot_keeps_its_place_and_goes_on_where_it_was(lab: Lab) -> None:
    job_id = lab.submit(**LONG)
    lab.ensure_worker()
    lab.rows.wait_for_step(job_id, 2)
    for _ in range(2):
        assert lab.post(job_id, "pause").status_code == 200
    lab.wait_for_status(job_id, "paused")
    step = lab.rows.wait_for_resume_point(job_id)
    assert lab.rows.attempt_count(job_id) == 0
    for _ in range(2):
        assert lab.post(job_id, "resume").json()["status"] in ("queued", "running")
    lab.succeed(job_id)
    assert lab.rows.has_said(job_id, f"Resumed from step {step}.")
    assert lab.rows.outcomes(job_id) == ["paused", "succeeded"]
    assert [lab.post(job_id, verb).status_code for verb in ("pause", "resume")] == [409, 409]


def test_a_damaged_resume_point_is_passed_over_for_the_one_before_it(lab: Lab) -> None:
    job_id = lab.submit(**LONG)
    lab.ensure_worker()
    lab.rows.wait_for_step(job_id, 13)
    assert lab.post(job_id, "pause").status_code == 200
    lab.wait_for_status(job_id, "paused")
    query = "select step, object_prefix from resume_points where job_id = %s order by step"
    (older, _), (newest, prefix) = lab.rows.sql(query, job_id)
    lab.store.put_bytes(f"{prefix}slot_state.safetensors", b"damaged", content_type="application/octet-stream")
    lab.post(job_id, "resume")
    lab.succeed(job_id)
    assert lab.rows.has_said(job_id, f"The resume point of step {newest} cannot be used")
    assert lab.rows.has_said(job_id, f"Resumed from step {older}.")
    assert lab.rows.metric_steps(job_id) == list(range(1, 81))
