"""An upgrade from the previous version and back, with jobs in every state: no job is lost, and none is charged.

The old worker runs beside the new processes for a while, as in any rollout. Migrations only add, so the old processes
also run on the new schema when an operator goes back.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import psycopg
import pytest
from openai import OpenAI

from cli.commands.promises import run_checks
from tests.e2e.lab import BASE_MODEL
from tests.e2e.rollout import ROWS, Member, Rollout
from tests.history import HERE, unpack
from tests.waiting import wait_until

# What an operator runs who has the version before this one. After a release: its last commit.
BEFORE = "d8d0bd2"
# Of the job that changes hands twice, while processes start beside it; the other jobs are short.
LONG = {"n_epochs": 50, "num_rows": 50}


class Upgrade:
    """One API, one schedule and one or two workers, a tenant whose jobs run one at a time, and what became of each."""

    def __init__(self, rollout: Rollout, directory: Path, *, tree: Path) -> None:
        self._rollout, self._logs = rollout, directory / "logs"
        key = rollout.create_tenant(tree, "acme", "--max-running", "1")
        self.client = OpenAI(base_url=rollout.url, api_key=key, max_retries=5)

    def submit(self, *, n_epochs: int = 5, num_rows: int = 12) -> str:
        rows = b"\n".join(itertools.islice(itertools.cycle(ROWS.splitlines()), num_rows))
        file = self.client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
        parameters = {"n_epochs": n_epochs, "batch_size": 1}
        jobs = self.client.fine_tuning.jobs
        return jobs.create(model=BASE_MODEL, training_file=file.id, hyperparameters=parameters).id  # type: ignore[arg-type]

    def find(self, question: str, job_id: str) -> object:
        return self._rollout.ask(question, job_id.removeprefix("ftjob-"))

    def wait_for_status(self, job_id: str, status: str) -> None:
        wait_until(lambda: self.find("select status from jobs where id = %s", job_id) == status, what=status)

    def trained_steps(self, job_id: str) -> int:
        return int(str(self.find("select trained_steps from jobs where id = %s", job_id)))

    def newest_point(self, job_id: str) -> int:
        return int(str(self.find("select coalesce(max(step), 0) from resume_points where job_id = %s", job_id)))

    def has_resumed(self, job_id: str, step: int) -> bool:
        asked = "select 1 from events where message = %s and job_id = %s"
        told = f"Resumed from step {step}."
        return self._rollout.ask(asked, told, job_id.removeprefix("ftjob-")) is not None

    def leave(self, worker: Member, job_id: str) -> int:
        """Tell a worker to end while it trains a job; return the step that it has stored."""
        self._rollout.remove("worker", worker)
        assert self.trained_steps(job_id) == self.newest_point(job_id) > 0, "a step was taken for nothing"
        return self.newest_point(job_id)

    def check(self, job_ids: list[str]) -> None:
        """Wait for the jobs' ends: each has succeeded, each step was taken once, and no attempt was charged."""
        wait_until(
            lambda: not self._rollout.ask("select 1 from jobs where finished_at is null limit 1"), what="the end"
        )
        for job_id in job_ids:
            assert self.find("select status from jobs where id = %s", job_id) == "succeeded"
            assert self.find("select attempt_count from jobs where id = %s", job_id) == 1
            assert self.find("select count(distinct step) from metrics where job_id = %s", job_id) == self.find(
                "select total_steps from jobs where id = %s", job_id
            )
        with psycopg.connect(self._rollout.owner_url) as connection:
            outcomes = {row[0] for row in connection.execute("select outcome from attempts").fetchall()}
        assert outcomes == {"succeeded", "preempted", "paused"}
        broken = [
            each for each in run_checks(self._rollout.owner_url, self._rollout.storage, is_deep=True) if each.num_broken
        ]
        assert broken == []
        assert [path.name for path in self._logs.iterdir() if "Traceback" in path.read_text()] == []


@pytest.mark.timeout(900)
def test_jobs_in_every_state_live_through_an_upgrade_and_the_way_back(
    rollout: Rollout, registry: Path, tmp_path: Path
) -> None:
    old = unpack(BEFORE, tmp_path / "before")
    rollout.migrate(old, registry)
    schedule, api, worker = (rollout.add(kind, old) for kind in ("schedule", "api", "worker"))
    upgrade = Upgrade(rollout, tmp_path, tree=old)
    jobs = upgrade.client.fine_tuning.jobs
    ended = upgrade.submit(n_epochs=1)
    upgrade.wait_for_status(ended, "succeeded")
    paused = upgrade.submit(n_epochs=50)
    wait_until(lambda: upgrade.newest_point(paused) > 0, what="a resume point")
    jobs.pause(paused)
    upgrade.wait_for_status(paused, "paused")
    running, queued = upgrade.submit(**LONG), upgrade.submit()
    wait_until(lambda: upgrade.newest_point(running) > 0, what="a resume point")

    rollout.migrate(HERE, registry)
    new_schedule, new_api, new_worker = (rollout.add(kind, HERE) for kind in ("schedule", "api", "worker"))
    rollout.remove("schedule", schedule)
    rollout.remove("api", api)
    before = upgrade.trained_steps(running)
    wait_until(
        lambda: upgrade.trained_steps(running) > before, what="a step of the old worker beside the new processes"
    )
    assert jobs.retrieve(ended).status == "succeeded"
    assert jobs.retrieve(queued).status == "queued"
    step = upgrade.leave(worker, running)
    wait_until(lambda: upgrade.has_resumed(running, step), what="the new worker to go on where the old one was")
    jobs.resume(paused)

    wait_until(lambda: upgrade.newest_point(running) > step, what="a resume point of the new worker")
    step = upgrade.leave(new_worker, running)
    for kind in ("schedule", "api", "worker"):
        rollout.add(kind, old)
    rollout.remove("api", new_api)
    rollout.remove("schedule", new_schedule)
    wait_until(lambda: upgrade.has_resumed(running, step), what="the old worker to go on where the new one was")
    upgrade.check([ended, paused, running, queued])
