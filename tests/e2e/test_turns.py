"""Fair sharing over time, on real workers: a slot is lent after its quantum, and a base keeps its worker for a turn."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from tests.e2e.lab import Lab
from tests.waiting import wait_until

SLOTS = 4
ENDLESS: dict[str, Any] = {"n_epochs": 50, "num_rows": 400}


@pytest.fixture
def impatient(lab: Lab) -> Iterator[Lab]:
    """A lab whose one worker lends and turns within seconds."""
    lab.kill_workers()
    lab.start_worker(ESPALIER_QUANTUM_SECONDS="2", ESPALIER_TURN_SECONDS="2", ESPALIER_MAX_LOADING_FRACTION="1")
    yield lab
    lab.cancel_all()
    lab.kill_workers()


def explain(lab: Lab, job_id: str) -> str:
    reason = lab.get(f"{job_id}/explain").json()["reason"]
    return str(reason["code"]) if reason else ""


def is_running_now(lab: Lab, job_id: str) -> bool:
    return bool(lab.rows.outcomes(job_id)[-1] is None)


def test_a_whale_lends_a_slot_to_a_newcomer_and_its_job_goes_on_where_it_stood(impatient: Lab) -> None:
    lab = impatient
    whale = [lab.submit(**ENDLESS, seed=seed) for seed in range(SLOTS)]
    for job_id in whale:
        lab.rows.wait_for_step(job_id, 1)
    with lab.as_tenant("globex"):
        lab.succeed(lab.submit(n_epochs=1))
    lent = [job_id for job_id in whale if "lent" in lab.rows.outcomes(job_id)]
    assert lent
    for job_id in lent:
        wait_until(partial(lab.rows.has_said, job_id, "Resumed from step "), what="the next attempt")
        resumed = [message for message in lab.rows.messages(job_id) if message.startswith("Resumed from step ")]
        step = int(resumed[0].split()[-1].rstrip("."))
        lab.rows.wait_for_step(job_id, step + 2)
        assert lab.rows.attempt_count(job_id) == 1, "what was lent does not count"
        steps = lab.rows.metric_steps(job_id)
        assert steps == list(range(1, len(steps) + 1)), "no step is lost, and none is shown twice"


def test_a_job_of_another_base_comes_to_its_turn_before_its_tenants_younger_jobs(impatient: Lab) -> None:
    """What was seen: ten jobs of one pool kept queued, and an older one of another pool waited for ever."""
    lab = impatient
    running = [lab.submit(**ENDLESS, seed=seed) for seed in range(SLOTS)]
    for job_id in running:
        lab.rows.wait_for_step(job_id, 1)
    with lab.rows.claims_held():  # so that it is asked before the turn ends
        elsewhere = lab.submit(n_epochs=1, quantization="nf4")
        younger = [lab.submit(n_epochs=1, seed=seed) for seed in range(3)]
        assert explain(lab, elsewhere) == "tenant_concurrency"
    lab.succeed(elsewhere)
    for job_id in running:
        assert "lent" in lab.rows.outcomes(job_id)
        wait_until(partial(is_running_now, lab, job_id), what="the turn of the first base")
        assert lab.rows.attempt_count(job_id) == 1
    first_attempt = "select started_at from attempts where job_id = %s order by lease_token limit 1"
    started = lab.rows.sql(first_attempt, elsewhere)[0][0]
    assert not [job_id for job_id in younger for (at,) in lab.rows.sql(first_attempt, job_id) if at < started]
