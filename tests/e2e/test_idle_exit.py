"""An idle worker ends by itself, but never with a job. A worker that is its container's first process drains."""

from __future__ import annotations

import datetime as dt
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from local.processes import ChildProcess
from tests.e2e.lab import LONG, Lab, is_running, stop_process
from tests.waiting import takes_at_least, wait_until

IDLE_SECONDS = 1.0
IDLES_OUT = {"ESPALIER_IDLE_EXIT_SECONDS": str(IDLE_SECONDS)}


@pytest.fixture
def lab(lab: Lab) -> Iterator[Lab]:
    lab.kill_workers()
    yield lab
    lab.kill_workers()


def wait_for_exit(worker: ChildProcess) -> int:
    wait_until(lambda: not worker.is_alive, what="the worker's own end")
    return int(worker._process.returncode)


def instant_of(worker: ChildProcess, event: str) -> dt.datetime:
    """Return when an event is first logged by a worker. Its trainer may log the same one later."""
    line, *_ = Lab.told_by(worker, event)
    return dt.datetime.fromisoformat(line["timestamp"])


def test_a_worker_without_a_job_ends_with_status_0_and_takes_its_row_and_its_trainer_with_it(lab: Lab) -> None:
    with takes_at_least(IDLE_SECONDS):
        worker = lab.start_worker(**IDLES_OUT)
        trainer = lab.trainer_of(worker)
        assert wait_for_exit(worker) == 0
    assert not is_running(trainer)
    assert not lab.rows.has_worker(worker.spec.name)
    assert len(lab.told_by(worker, "worker.idled_out")) == 1


def test_a_worker_with_a_job_stays_until_its_end_and_leaves_after_it(lab: Lab) -> None:
    job_id = lab.submit(**LONG)
    worker = lab.start_worker(ESPALIER_IDLE_EXIT_SECONDS="0.1")  # many times within this job
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == ["succeeded"]
    assert wait_for_exit(worker) == 0


def test_the_idle_time_counts_from_the_end_of_the_last_job_and_from_that_of_a_load(lab: Lab) -> None:
    idle = dt.timedelta(seconds=3)  # a trainer takes longer to start, and this job takes longer than the rest
    worker = lab.start_worker(ESPALIER_IDLE_EXIT_SECONDS="3")
    wait_for_exit(worker)
    assert instant_of(worker, "worker.idled_out") - instant_of(worker, "base_model.loaded") >= idle
    job_id = lab.submit(**LONG)
    worker = lab.start_worker(ESPALIER_IDLE_EXIT_SECONDS="3")
    lab.succeed(job_id)
    wait_for_exit(worker)
    assert instant_of(worker, "worker.idled_out") - instant_of(worker, "job.left") >= idle


def test_a_job_that_comes_when_the_worker_has_decided_is_the_next_workers_and_nobody_is_charged(lab: Lab) -> None:
    """A frozen trainer is waited for, so that the wake-up finds a worker that has decided and still lives."""
    worker = lab.start_worker(**IDLES_OUT)
    trainer = lab.trainer_of(worker)
    wait_until(lambda: bool(lab.told_by(worker, "base_model.loaded")), what="its base")
    stop_process(trainer.pid)
    wait_until(lambda: bool(lab.told_by(worker, "worker.idled_out")), what="its decision")
    job_id = lab.submit(n_epochs=1)
    assert wait_for_exit(worker) == 0
    assert (lab.job(job_id).status, lab.rows.attempt_count(job_id), lab.rows.outcomes(job_id)) == ("queued", 0, [])
    lab.start_worker()
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == ["succeeded"]
    assert lab.rows.attempt_count(job_id) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="a process namespace takes root")
def test_the_first_process_of_a_container_drains_when_it_is_asked_to_stop(lab: Lab) -> None:
    """The kernel drops a signal to process 1 for which it has no handler, and nobody else reaps its orphans."""
    job_id = lab.submit(**LONG)
    worker = lab.start_worker(inside=("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"))
    lab.rows.wait_for_step(job_id, 3)
    (first,) = psutil.Process(worker.pid).children()
    status = Path(f"/proc/{first.pid}/status").read_text()
    assert next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1] == "1"
    first.send_signal(signal.SIGTERM)
    assert wait_for_exit(worker) == 0
    assert (lab.job(job_id).status, lab.rows.attempt_count(job_id)) == ("queued", 0)
    assert lab.rows.outcomes(job_id) == ["preempted"]
    assert lab.rows.metric_steps(job_id)[-1] == lab.rows.wait_for_resume_point(job_id), "no step is taken twice"
