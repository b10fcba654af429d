"""Faults of the servers while a worker trains. The numbers are the rows of the table of faults."""

from __future__ import annotations

import signal
from contextlib import ExitStack

import pytest

from tests.e2e.lab import LEASE_SECONDS, LONG, Lab, is_running
from tests.faults import Answer503, Cut, FaultProxy, FlipByte, Hang, port_of, with_port
from tests.waiting import wait_until

FORGIVEN = "Its worker had only lost touch; that attempt does not count."


@pytest.mark.fault(11)
def test_11_jobs_run_although_redis_hangs_because_a_worker_that_nobody_wakes_claims(lab: Lab) -> None:
    lab.kill_workers()
    lab.start_worker(ESPALIER_DEAF_SECONDS="2")
    lab.succeed(lab.submit(n_epochs=1))
    with lab.servers.redis.during(Hang()):
        lab.succeed(lab.submit(n_epochs=1))


@pytest.mark.fault(13)
def test_13_a_database_that_goes_away_for_a_moment_costs_no_attempt(lab: Lab) -> None:
    lab.kill_workers()
    lab.start_worker(ESPALIER_LEASE_SECONDS="60")  # longer than the restart
    job_id = lab.submit(n_epochs=20, num_rows=80)
    lab.rows.wait_for_step(job_id, 3)
    with lab.servers.postgres.during(Cut()):
        answer = lab.get(job_id)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    held_until = lab.rows.lease_end(job_id)
    lab.servers.restart("postgres", blow=signal.SIGQUIT)  # as `pg_ctl restart -m immediate` does
    wait_until(lambda: lab.rows.lease_end(job_id) > held_until, what="a heartbeat after the restart")
    wait_until(lambda: lab.get(job_id).is_success, what="the API's return")
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == ["succeeded"]
    assert lab.rows.metric_steps(job_id) == list(range(1, 401))


@pytest.mark.fault(14)
def test_14_a_database_away_for_longer_than_a_lease_stops_the_training_before_its_end(lab: Lab) -> None:
    lab.kill_workers()
    job_id = lab.submit(n_epochs=20, num_rows=80)
    worker = lab.start_worker()
    lab.rows.wait_for_resume_point(job_id)
    trainer = lab.trainer_of(worker)
    with lab.servers.postgres.during(Hang()):
        wait_until(lambda: not is_running(trainer), what="the self-fence")
        (fenced,) = lab.told_by(worker, "worker.self_fenced")
        assert fenced["silent_seconds"] < LEASE_SECONDS, "by its own clock, which began before the database's"
        lab.rows.wait_for_instant(lab.rows.lease_end(job_id))  # the outage that is too long
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id)[-1] == "succeeded"
    assert len(lab.rows.outcomes(job_id)) == 2


@pytest.mark.fault(14)
def test_14_three_cuts_between_a_worker_and_the_database_cost_no_attempt(lab: Lab) -> None:
    """The schedule reaches the database all the while, and expires the lease each time."""
    lab.kill_workers()
    direct = lab.servers.direct.postgres_url
    with FaultProxy(port_of(direct)) as proxy:
        url = with_port(lab.stack.process("worker").spec.env["ESPALIER_DATABASE_URL"], proxy.port)
        worker = lab.start_worker(ESPALIER_DATABASE_URL=url)
        job_id = lab.submit(n_epochs=20, num_rows=80)
        for number in range(1, 4):
            lab.wait_for_status(job_id, "running")
            lab.rows.wait_for_resume_point(job_id)
            with proxy.during(Cut()):
                wait_until(lambda number=number: lab.rows.outcomes(job_id).count("lost") == number, what="the expiry")  # type: ignore[misc]
            wait_until(lambda number=number: lab.rows.messages(job_id).count(FORGIVEN) == number, what="its word")  # type: ignore[misc]
        lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == [*["lost"] * 3, "succeeded"]
    assert lab.rows.attempt_count(job_id) == 1
    assert len(lab.told_by(worker, "worker.self_fenced")) == 3


@pytest.mark.fault(14)
def test_14_a_worker_that_is_killed_costs_an_attempt_each_time(lab: Lab) -> None:
    lab.kill_workers()
    job_id = lab.submit(n_epochs=20, num_rows=80)
    for number in range(1, 4):
        worker = lab.start_worker()
        lab.wait_for_status(job_id, "running")
        worker.kill()
        wait_until(lambda number=number: lab.rows.outcomes(job_id).count("lost") == number, what="the expiry")  # type: ignore[misc]
    job = lab.job(job_id)
    assert (job.status, job.error.code) == ("failed", "worker_lost")


@pytest.mark.fault(19)
def test_19_an_object_store_that_is_away_at_the_finish_costs_neither_the_job_nor_an_attempt(lab: Lab) -> None:
    job_id = lab.submit(n_epochs=2)
    lab.rows.limit_attempts(job_id, 1)
    lab.ensure_worker()
    lab.rows.wait_for_step(job_id, 1)
    with lab.servers.s3.during(Cut()):
        wait_until(
            lambda: lab.rows.has_said(job_id, "The adapter could not be stored: The object store did not answer")
        )
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == ["failed", "succeeded"]
    assert lab.rows.attempt_count(job_id) == 1


@pytest.mark.fault(20)
def test_20_an_object_store_that_answers_503_for_a_while_costs_nothing(lab: Lab) -> None:
    lab.kill_workers()
    lab.start_worker(ESPALIER_STORAGE_PATIENCE_SECONDS="300")
    s3 = lab.servers.s3
    with ExitStack() as faults:
        with lab.rows.claims_held():
            job_id = lab.submit(**LONG)
            faults.enter_context(s3.during(Answer503()))
            hits = s3.num_hits
        wait_until(lambda: s3.num_hits >= hits + 2, what="a second try of the download")
    lab.rows.wait_for_step(job_id, 62)
    with s3.during(Answer503()):
        lab.rows.wait_for_step(job_id, 80)
        hits = s3.num_hits
        wait_until(lambda: s3.num_hits > hits, what="another try of an upload")
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == ["succeeded"]


@pytest.mark.fault(21)
def test_21_an_object_store_that_hangs_holds_nobody_for_longer_than_15_seconds_and_costs_nothing(lab: Lab) -> None:
    lab.kill_workers()
    lab.start_worker(ESPALIER_STORAGE_PATIENCE_SECONDS="300")
    lab.succeed(lab.submit(n_epochs=1))  # the base is loaded from here on
    s3 = lab.servers.s3
    with ExitStack() as faults:
        with lab.rows.claims_held():
            job_id = lab.submit(n_epochs=1)
            faults.enter_context(s3.during(Hang()))
            hits = s3.num_hits
        wait_until(lambda: s3.num_hits > hits + 1, what="a second try of the download")
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == ["succeeded"]


@pytest.mark.fault(22)
def test_22_a_dataset_that_arrives_damaged_is_tried_again_and_then_reported(lab: Lab) -> None:
    lab.ensure_worker()
    with lab.servers.s3.during(FlipByte()):
        job_id = lab.submit(n_epochs=1)
        lab.rows.limit_attempts(job_id, 1)
        job = lab.wait_for_end(job_id)
    assert (job.status, job.error.code, job.error.param) == ("failed", "integrity", "training_file")
    assert lab.rows.outcomes(job_id) == ["failed"]
