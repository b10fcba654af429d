"""Every component is replaced while jobs run: no job is lost, no attempt is charged, no client sees an error."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import psycopg
import pytest
from openai import OpenAI

from cli.commands.promises import run_checks
from tests.e2e.rollout import Load, Rollout
from tests.history import HERE, unpack
from tests.waiting import wait_until

# The last commit before images, compose and Kubernetes: what an upgrade starts from.
BEFORE = "1b075f1"


def make_client(rollout: Rollout, tree: Path) -> OpenAI:
    return OpenAI(base_url=rollout.url, api_key=rollout.create_tenant(tree, "acme"), max_retries=5)


def check_that_nothing_was_lost(rollout: Rollout, load: Load) -> None:
    wait_until(lambda: not rollout.ask("select 1 from jobs where finished_at is null limit 1"), what="the end of jobs")
    assert load.errors == []
    with psycopg.connect(rollout.owner_url) as connection:
        ends: dict[str, str] = dict(
            connection.execute("select 'ftjob-' || replace(id::text, '-', ''), status from jobs").fetchall()
        )
        outcomes = Counter(row[0] for row in connection.execute("select outcome from attempts").fetchall())
        charged = connection.execute("select count(*) from jobs where attempt_count <> 1").fetchone()
    assert {job_id: ends[job_id] for job_id in load.accepted} == dict.fromkeys(load.accepted, "succeeded")
    assert len(ends) == len(load.accepted), "a submission was accepted twice"
    assert set(outcomes) <= {"succeeded", "preempted"}
    sys.stderr.write(f"{load.num_requests} requests, {len(load.accepted)} jobs, attempts {dict(outcomes)}\n")
    assert outcomes["preempted"] > 0, "no worker was replaced in the middle of a job"
    assert charged == (0,)
    broken = [each for each in run_checks(rollout.owner_url, rollout.storage, is_deep=True) if each.num_broken]
    assert broken == []


@pytest.mark.timeout(900)
def test_every_process_is_replaced_under_load_and_nothing_is_lost(rollout: Rollout, registry: Path) -> None:
    rollout.migrate(HERE, registry)
    rollout.start(HERE)
    load = Load(make_client(rollout, HERE))
    with load.running():
        rollout.replace_all(HERE)
    check_that_nothing_was_lost(rollout, load)


@pytest.mark.timeout(900)
def test_an_upgrade_under_load_loses_nothing(rollout: Rollout, registry: Path, tmp_path: Path) -> None:
    old = unpack(BEFORE, tmp_path / "before")
    rollout.migrate(old, registry)
    rollout.start(old)
    load = Load(make_client(rollout, old))
    with load.running():
        rollout.migrate(HERE, registry)
        rollout.replace_all(HERE)
    check_that_nothing_was_lost(rollout, load)
