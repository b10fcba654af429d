"""Faults of a worker and its trainer. The numbers are the rows of the table of faults."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.lab import LONG, Lab, continue_process, is_running, stop_process
from tests.waiting import wait_until


@pytest.mark.fault(3)
def test_03_a_job_that_kills_its_trainer_every_time_fails_and_its_neighbours_are_not_charged(lab: Lab) -> None:
    worker = lab.ensure_worker()
    with lab.rows.claims_held():
        poison = lab.submit(**LONG, seed=1)
        lab.rows.limit_attempts(poison, 2)
        neighbours = [lab.submit(**LONG, seed=seed) for seed in (2, 3)]
    query = "select status, lease_token from jobs where id = %s"
    num_kills = 0
    for job_id in neighbours:
        lab.rows.wait_for_step(job_id, 1)

    def has_failed() -> bool:
        nonlocal num_kills
        status, token = lab.rows.sql(query, poison)[0]
        started = f"select max(step) from metrics where job_id = %s and lease_token = {token or 0}"
        if status == "running" and lab.rows.sql(started, poison)[0][0] is not None:
            lab.trainer_of(worker).send_signal(signal.SIGSEGV)
            num_kills += 1
            wait_until(lambda: lab.rows.sql(query, poison)[0][1] != token)
        return bool(status == "failed")

    wait_until(has_failed)
    assert num_kills == 3, "once with its neighbours, uncharged, and twice alone"
    assert lab.job(poison).error.code == "trainer_crashed"
    assert lab.rows.attempt_count(poison) == 2
    for job_id in neighbours:
        lab.succeed(job_id)
        assert lab.rows.attempt_count(job_id) == 1, lab.rows.messages(job_id)


def test_a_suspect_for_whom_no_worker_is_ever_idle_is_tried_alone_by_a_busy_one(lab: Lab) -> None:
    lab.ensure_worker()
    busy = lab.submit(n_epochs=8, num_rows=80)
    lab.rows.wait_for_step(busy, 2)
    with lab.rows.claims_held():
        suspect = lab.submit(n_epochs=2)
        suspected = (
            "update jobs set suspect_step = 0, run_after = now() - interval '2 minutes' where id = %s returning 1"
        )
        lab.rows.sql(suspected, suspect)
    lab.succeed(suspect)
    lab.succeed(busy)
    assert lab.rows.outcomes(busy) == ["preempted", "succeeded"]
    overlap = "select 1 from attempts a, attempts b where a.job_id <> b.job_id and a.job_id = %s and b.outcome <> 'preempted' and (a.started_at, a.ended_at) overlaps (b.started_at, b.ended_at)"
    assert not lab.rows.sql(overlap, suspect)


@pytest.mark.fault(4)
def test_04_a_trainer_killed_in_an_upload_leaves_no_row_and_its_job_goes_on_under_a_new_prefix(
    lab: Lab, tmp_path: Path
) -> None:
    fuse = tmp_path / "fuse"
    fuse.touch()
    lab.kill_workers()
    job_id = lab.submit(n_epochs=2)
    lab.start_worker(CRASHPOINT=f"upload:2:{fuse}")
    lab.succeed(job_id)
    assert not fuse.exists()
    assert lab.rows.outcomes(job_id) == ["failed", "succeeded"]
    tokens = [row[0] for row in lab.rows.sql("select lease_token from attempts where job_id = %s order by 1", job_id)]
    for table in ("checkpoints", "adapters"):
        prefixes = [row[0] for row in lab.rows.sql(f"select object_prefix from {table} where job_id = %s", job_id)]
        assert all(f"/{tokens[1]}/" in prefix for prefix in prefixes)


@pytest.mark.fault(5, 6)
@pytest.mark.parametrize(
    ("point", "outcomes"),
    [
        pytest.param("pre_finish:1", ["lost", "succeeded"], id="05_between_upload_and_commit"),
        pytest.param("post_finish:1", ["succeeded"], id="06_after_the_commit"),
    ],
)
def test_05_06_a_worker_killed_around_its_commits_leaves_one_result(lab: Lab, point: str, outcomes: list[str]) -> None:
    heir = lab.ensure_worker()
    stop_process(heir.pid)  # until its turn
    job_id = lab.submit(n_epochs=1)
    doomed = lab.start_worker(CRASHPOINT=point)
    wait_until(lambda: not doomed.is_alive, what="the crash")
    continue_process(heir.pid)
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == outcomes
    ((prefix, files),) = lab.rows.sql("select object_prefix, files from adapters where job_id = %s", job_id)
    for file in files:
        assert lab.store.hash_object(prefix + file["name"]).sha256 == file["sha256"]


@pytest.mark.fault(23)
def test_23_a_scratch_disk_that_is_full_ends_the_job_and_not_the_trainer(lab: Lab) -> None:
    worker = lab.ensure_worker()
    lab.succeed(lab.submit(n_epochs=1))
    trainer = lab.trainer_of(worker)
    unlimited = resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    job_id = lab.submit(n_epochs=1)
    lab.rows.limit_attempts(job_id, 1)
    job = lab.wait_for_end(job_id)
    assert (job.status, job.error.code) == ("failed", "worker_disk")
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, unlimited)
    lab.succeed(lab.submit(n_epochs=1))
    assert is_running(trainer)


@pytest.mark.fault(27)
def test_27_a_worker_that_was_frozen_beyond_its_lease_changes_nothing_when_it_wakes(lab: Lab) -> None:
    lab.kill_workers()
    job_id = lab.submit(**LONG)
    zombie = lab.start_worker()
    lab.rows.wait_for_resume_point(job_id)
    trainer = lab.trainer_of(zombie)
    stop_process(zombie.pid)
    heir = lab.start_worker()
    wait_until(lambda: lab.rows.outcomes(job_id)[:1] == ["lost"])
    wait_until(lambda: lab.rows.has_said(job_id, "Attempt 2"))
    continue_process(zombie.pid)
    wait_until(lambda: not is_running(trainer), what="the end of the frozen worker's trainer")
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == ["lost", "succeeded"]
    rows = lab.rows.sql("select step, lease_token from metrics where job_id = %s order by step", job_id)
    assert [step for step, _ in rows] == list(range(1, 81))
    assert [token for _, token in rows] == sorted(token for _, token in rows), "no step of the elder among the heir's"
    zombie.kill()
    assert heir.is_alive


@pytest.mark.fault(31)
def test_31_a_worker_stopped_while_idle_or_claiming_leaves_no_job_behind(lab: Lab) -> None:
    worker = lab.ensure_worker()
    lab.succeed(lab.submit(n_epochs=1))
    job_id = lab.submit(**LONG)
    worker.ask_to_stop()  # somewhere around the claim
    wait_until(lambda: not worker.is_alive)
    assert (lab.job(job_id).status, lab.rows.attempt_count(job_id)) == ("queued", 0)
    worker = lab.start_worker()
    lab.wait_for_status(job_id, "running")
    worker.ask_to_stop()  # right behind it
    wait_until(lambda: not worker.is_alive)
    assert (lab.job(job_id).status, lab.rows.attempt_count(job_id)) == ("queued", 0)


def test_an_idle_worker_has_its_base_warm_before_the_first_job_and_stops_at_once_while_it_warms(lab: Lab) -> None:
    lab.kill_workers()
    worker = lab.start_worker()
    trainer = lab.trainer_of(worker)
    worker.ask_to_stop()
    wait_until(lambda: not worker.is_alive)
    wait_until(lambda: not is_running(trainer))
    worker = lab.start_worker()
    is_warm = "select count(*) from workers where given_name = %s and state = 'idle' and pool is not null"
    wait_until(lambda: lab.rows.sql(is_warm, worker.spec.name)[0][0] == 1, what="a warm worker")
    warm = lab.trainer_of(worker).pid
    lab.succeed(lab.submit(n_epochs=1))
    assert lab.trainer_of(worker).pid == warm


@pytest.mark.fault(33)
def test_33_a_host_without_memory_for_a_job_is_told_and_not_tried_again(lab: Lab) -> None:
    worker = lab.ensure_worker()
    lab.succeed(lab.submit(n_epochs=1))
    trainer = lab.trainer_of(worker)
    used = trainer.memory_info().vms
    resource.prlimit(trainer.pid, resource.RLIMIT_AS, (used + 2**25, resource.RLIM_INFINITY))
    job_id = lab.submit(n_epochs=1, adapter={"rank": 4096})  # ten times as much, which the host has and may not give
    job = lab.wait_for_end(job_id)
    assert (job.status, job.error.code) == ("failed", "oom_host")
    assert lab.rows.outcomes(job_id) == ["failed"]
    assert worker.is_alive


@pytest.mark.fault(34)
def test_34_a_job_too_large_for_the_device_is_told_what_to_lower_and_its_neighbour_trains_on(lab: Lab) -> None:
    neighbour = lab.submit(**LONG)
    worker = lab.ensure_worker()
    lab.rows.wait_for_step(neighbour, 1)
    job_id = lab.submit(n_epochs=1, adapter={"rank": 2**24})
    job = lab.wait_for_end(job_id)
    assert (job.status, job.error.code) == ("failed", "oom_gpu")
    assert "lower the rank" in job.error.message
    assert lab.rows.outcomes(job_id) == ["failed"]
    lab.succeed(neighbour)
    assert lab.rows.outcomes(neighbour) == ["succeeded"]
    assert worker.is_alive


@pytest.mark.fault(35)
def test_35_a_job_that_diverges_is_stopped_and_its_events_are_numbers(lab: Lab) -> None:
    lab.ensure_worker()
    # Each step multiplies the weights by 1 - 10.
    terms: dict[str, Any] = {
        "learning_rate": 1.0,
        "weight_decay": 10.0,
        "warmup_ratio": 0.0,
        "learning_rate_schedule": "constant",
    }
    job_id = lab.submit(**LONG, **terms)
    job = lab.wait_for_end(job_id)
    assert (job.status, job.error.code) == ("failed", "diverged")
    assert lab.rows.outcomes(job_id) == ["failed"]
    details = lab.rows.sql("select details from events where job_id = %s and details is not null", job_id)
    json.dumps([row[0] for row in details], allow_nan=False)


@pytest.mark.fault(36)
def test_36_a_training_that_hangs_is_stopped_although_its_process_lives(lab: Lab) -> None:
    lab.kill_workers()
    job_id = lab.submit(**LONG)
    worker = lab.start_worker(ESPALIER_STALL_SECONDS="8")
    lab.rows.wait_for_step(job_id, 2)
    stop_process(lab.trainer_of(worker).pid)
    job = lab.wait_for_end(job_id)
    assert (job.status, job.error.code) == ("failed", "stalled")
    assert lab.rows.outcomes(job_id) == ["failed"]
    assert worker.is_alive


@pytest.mark.fault(43)
def test_43_cancelling_at_any_moment_ends_once_and_frees_the_slot(lab: Lab) -> None:
    lab.ensure_worker()
    with lab.rows.claims_held():
        early = lab.submit(**LONG)
        assert [lab.post(early, "cancel").json()["status"] for _ in range(2)] == ["cancelled"] * 2
    running = lab.submit(n_epochs=50, num_rows=80)
    lab.rows.wait_for_step(running, 2)
    assert [lab.post(running, "cancel").json()["status"] for _ in range(2)] == ["cancelled"] * 2
    assert lab.rows.seconds_until_device_was_free(running) < 10
    booked = "select u.trained_tokens from usage u join attempts a on a.id = attempt_id where a.job_id = %s"
    wait_until(lambda: bool(lab.rows.sql(booked, running)), what="the end of the training")
    at_claim = lab.submit(**LONG)
    wait_until(lambda: lab.job(at_claim).status == "running")
    assert lab.post(at_claim, "cancel").json()["status"] == "cancelled"
    done = lab.submit(n_epochs=1, num_rows=12)
    lab.succeed(done)
    wait_until(lambda: bool(lab.rows.sql(booked, done)))
    num_tokens_a_row = lab.rows.sql(booked, done)[0][0] / 12
    assert lab.rows.sql(booked, running)[0][0] < num_tokens_a_row * 80 * 50 / 2, "it has ended long before its own end"
    assert lab.post(done, "cancel").status_code == 409
    for job_id in (early, running, at_claim):
        assert lab.job(job_id).status == "cancelled"
        assert not lab.rows.sql("select id from adapters where job_id = %s", job_id)


@pytest.mark.fault(44)
def test_44_a_job_cancelled_while_its_worker_is_frozen_stays_cancelled_when_it_wakes(lab: Lab) -> None:
    job_id = lab.submit(**LONG)
    worker = lab.ensure_worker()
    lab.rows.wait_for_step(job_id, 2)
    stop_process(worker.pid)
    held_until = lab.rows.lease_end(job_id)
    assert lab.post(job_id, "cancel").json()["status"] == "cancelled"
    lab.rows.wait_for_instant(held_until)  # so that the frozen worker's lease would be over
    num_told = len(lab.rows.messages(job_id))
    continue_process(worker.pid)
    lab.succeed(lab.submit(n_epochs=1))
    assert lab.job(job_id).status == "cancelled"
    assert len(lab.rows.messages(job_id)) == num_told
    assert lab.rows.outcomes(job_id) == ["cancelled"]
