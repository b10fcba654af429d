"""The cells of a job in the tables of `espalier jobs` and `espalier top`."""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid

from cli.commands.jobs import job_cells
from cli.pool_names import PoolNames
from core.domain.jobs import JobStatus
from core.services.oversight import JobOverview

NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
JOB = JobOverview(
    id=uuid.uuid4(),
    tenant="acme",
    pool="a@none",
    base_model_id="a",
    quantization=None,
    status=JobStatus.RUNNING,
    priority=0,
    total_steps=10,
    trained_steps=4,
    trained_tokens=None,
    pause_requested_at=None,
    attempt_count=1,
    max_attempts=3,
    error_code=None,
    worker_name="w",
    used_seconds=1.0,
    run_after=NOW,
    created_at=NOW,
    started_at=NOW,
    finished_at=None,
)


def test_a_job_that_pauses_and_one_that_has_failed_say_so_beside_their_status() -> None:
    names = PoolNames(["a@none"])
    pausing = dataclasses.replace(JOB, pause_requested_at=NOW)
    failed = dataclasses.replace(JOB, status=JobStatus.FAILED, error_code="diverged")
    shown = [job_cells(job, NOW, names)["status"] for job in (JOB, pausing, failed)]
    assert shown == ["running", "running, pausing", "failed diverged"]
