"""Workers on hosts whose clocks are wrong, or jump while they train."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from local.processes import ChildProcess
from tests.clocks import fake_clock, set_clock
from tests.e2e.lab import Lab
from tests.waiting import PATIENCE_SECONDS, wait_until


def reason_of(lab: Lab, job_id: str) -> str:
    url = f"{lab.stack.api_url}/v1/fine_tuning/jobs/{job_id}/explain"
    headers = {"authorization": f"Bearer {lab.api_key}"}
    answer = httpx.get(url, headers=headers, timeout=PATIENCE_SECONDS, trust_env=False).raise_for_status()
    return str((answer.json()["reason"] or {}).get("code"))


def offset_of(lab: Lab, worker: ChildProcess) -> float | None:
    """Return how far the clock is off that a worker says is wrong."""
    query = "select clock_offset_seconds from workers where given_name = %s and is_clock_wrong and alive_until > now()"
    found = lab.rows.sql(query, worker.spec.name)
    return found[0][0] if found else None


@pytest.mark.fault(28)
@pytest.mark.parametrize("shift", ["-20m", "+20m"])
def test_a_worker_whose_clock_is_wrong_claims_nothing_and_the_job_runs_on_a_sound_one(
    lab: Lab, tmp_path: Path, shift: str
) -> None:
    lab.kill_workers()
    wrong = lab.start_worker(**fake_clock(tmp_path / "clock", shift), ESPALIER_DEAF_SECONDS="5")
    job_id = lab.submit(n_epochs=1)
    wait_until(lambda: reason_of(lab, job_id) == "clock_wrong", what="the reason")
    assert offset_of(lab, wrong) == pytest.approx(1200 if shift == "+20m" else -1200, abs=5)
    sound = lab.start_worker()
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == ["succeeded"]
    ((by,),) = lab.rows.sql("select worker_name from attempts where job_id = %s", job_id)
    assert by.startswith(f"{sound.spec.name}:{sound.pid}:")
    (told,) = lab.told_by(wrong, "worker.clock_wrong")
    assert abs(told["offset_seconds"]) == pytest.approx(1200, abs=5)


@pytest.mark.parametrize("shift", ["-10s", "+10s"])
def test_a_clock_that_is_a_little_off_does_not_matter(lab: Lab, tmp_path: Path, shift: str) -> None:
    lab.kill_workers()
    lab.start_worker(**fake_clock(tmp_path / "clock", shift))
    job_id = lab.submit(n_epochs=1)
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == ["succeeded"]


@pytest.mark.fault(28)
@pytest.mark.parametrize("shift", ["-1h", "+1h"])
def test_a_clock_that_jumps_while_a_job_trains_costs_it_nothing_and_holds_up_the_next_until_it_is_set(
    lab: Lab, tmp_path: Path, shift: str
) -> None:
    lab.kill_workers()
    worker = lab.start_worker(**fake_clock(tmp_path / "clock", "+0"), ESPALIER_DEAF_SECONDS="5")
    training = lab.submit(n_epochs=4, num_rows=40)
    lab.rows.wait_for_step(training, 3)
    set_clock(tmp_path / "clock", shift)
    wait_until(lambda: offset_of(lab, worker) is not None, what="the wrong clock")
    waiting = lab.submit(n_epochs=1)
    lab.succeed(training)
    assert lab.rows.outcomes(training) == ["succeeded"]
    ((seconds,),) = lab.rows.sql("select used_seconds from attempts where job_id = %s", training)
    assert 0 < seconds < 600, "an hour is not billed"
    wait_until(lambda: reason_of(lab, waiting) == "clock_wrong", what="the reason")
    assert lab.rows.outcomes(waiting) == []
    set_clock(tmp_path / "clock", "+0")
    lab.succeed(waiting)
    assert lab.rows.outcomes(waiting) == ["succeeded"]
