"""The database fails over: its address leads to a standby that takes no writes for a while, and then is promoted."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tests.e2e.lab import Lab, running_lab
from tests.standbys import Standby
from tests.waiting import PATIENCE_SECONDS, wait_until


@pytest.fixture
def lab(tiny_base: Path, tmp_path: Path) -> Iterator[Lab]:
    with running_lab(tiny_base, tmp_path) as made:
        yield made


@contextmanager
def failed_over(lab: Lab, directory: Path) -> Iterator[Standby]:
    """Stop the primary, and let its address lead to a standby that has all of it."""
    with Standby(directory, lab.servers.direct.postgres_url) as standby:
        lab.servers.postgres.lead_to(standby.port)
        lab.servers.stop_one("postgres")  # which waits until the standby has followed to the end
        lab.servers.direct = replace(lab.servers.direct, postgres_url=standby.url)
        yield standby


def readiness(lab: Lab) -> httpx.Response:
    return httpx.get(f"{lab.stack.api_url}/readyz", trust_env=False, timeout=PATIENCE_SECONDS)


def follow(lab: Lab, job_id: str) -> list[str]:
    """Read a job's event stream to its end, and return its lines."""
    url = f"{lab.stack.api_url}/v1/fine_tuning/jobs/{job_id}/stream"
    headers = {"authorization": f"Bearer {lab.api_key}"}
    with httpx.stream("GET", url, headers=headers, trust_env=False, timeout=PATIENCE_SECONDS) as stream:
        return list(stream.iter_lines())


@pytest.mark.fault(56)
def test_a_failover_costs_no_job_nothing_is_charged_and_nobody_is_started_again(lab: Lab, tmp_path: Path) -> None:
    worker, api, schedule = lab.start_worker(), lab.stack.process("api"), lab.stack.process("schedule")
    busy = lab.submit(n_epochs=40)
    lab.rows.wait_for_step(busy, 3)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow, lab, busy)
        with failed_over(lab, tmp_path / "standby") as standby:
            wait_until(lambda: readiness(lab).status_code == httpx.codes.SERVICE_UNAVAILABLE, what="no readiness")
            wait_until(lambda: readiness(lab).json()["error"]["code"] == "database_read_only", what="the reason")
            for process in (worker, api, schedule):
                wait_until(lambda each=process: bool(lab.told_by(each, "database.unavailable")))  # type: ignore[misc]
            standby.promote()
            wait_until(lambda: readiness(lab).is_success, what="readiness")

            lab.succeed(busy)
            assert (lab.rows.outcomes(busy), lab.rows.attempt_count(busy)) == (["succeeded"], 1)
            told = following.result(PATIENCE_SECONDS)
            numbers = [line for line in told if line.startswith("id:")]
            assert len(numbers) == len(set(numbers)), "nothing twice"
            assert len(numbers) == len(lab.rows.messages(busy)), "nothing lost"
            assert "event: end" in told, "the stream went on"

            is_present = "select count(*) from workers where alive_until > clock_timestamp() and state <> %s"
            wait_until(lambda: lab.rows.sql(is_present, "stopping") == [(1,)], what="the worker's presence")
            listening = "select count(distinct usename) from pg_stat_activity where query ilike %s"
            wait_until(lambda: lab.rows.sql(listening, "listen %") == [(2,)], what="the listeners of API and schedule")

            lost = lab.submit(n_epochs=40)  # the schedule wakes a worker for it, and expires its lease
            lab.rows.wait_for_step(lost, 1)
            lab.kill_workers()
            wait_until(lambda: lab.rows.outcomes(lost) == ["lost"], what="expiry")
            assert api.is_alive
            assert schedule.is_alive
