"""A base so large for its device that a step takes many seconds: requests during the step do not wait for its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from core.db.session import connect
from core.domain.scheduling import FairnessTerms
from core.services.promises import check_rows
from tests.e2e.lab import Lab, running_lab
from tests.factories.tiny_bases import write_tiny_base
from tests.sessions import any_role_transaction
from tests.waiting import wait_until

# About 70 million parameters, at 4,000 tokens a step: more than ten seconds on any CPU, half a minute on most.
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12}
LONG_ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "Count."},
            {"role": "assistant", "content": " ".join(f"{number + seed}" for number in range(80))},
        ]
    }
    for seed in range(64)
]


@pytest.fixture(scope="module")
def slow_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    base = write_tiny_base(tmp_path_factory.mktemp("base"), **SHAPE)
    with running_lab(base, tmp_path_factory.mktemp("lab"), max_tokens_per_step=4096) as made:
        yield made
        made.cancel_all()


def wait_for_slot(lab: Lab, job_id: str) -> None:
    admitted = "select 1 from log_lines where name = 'job.admitted' and job_id = %s"
    wait_until(lambda: bool(lab.rows.sql(admitted, job_id)), what="a slot")


@pytest.mark.fault(43)
def test_43_a_job_cancelled_in_a_step_that_takes_long_leaves_the_device_before_the_step_ends(slow_lab: Lab) -> None:
    slow_lab.ensure_worker()
    job_id = slow_lab.submit(lines=LONG_ROWS, batch_size=64)
    wait_for_slot(slow_lab, job_id)
    assert slow_lab.post(job_id, "cancel").json()["status"] == "cancelled"
    assert slow_lab.rows.seconds_until_device_was_free(job_id) < 10
    assert slow_lab.rows.metric_steps(job_id) == []
    engine = connect(slow_lab.servers.direct.postgres_url)
    with any_role_transaction(engine) as session:
        assert [finding for finding in check_rows(session, FairnessTerms()) if finding.num_broken] == []
    engine.dispose()


@pytest.mark.fault(43)
def test_43_a_job_cancelled_in_a_step_of_others_leaves_the_device_and_they_train_on(slow_lab: Lab) -> None:
    slow_lab.ensure_worker()
    with slow_lab.rows.claims_held():
        staying, leaving = (
            slow_lab.submit(lines=LONG_ROWS[:8], batch_size=8, n_epochs=1, seed=seed) for seed in (1, 2)
        )
    for job_id in (staying, leaving):
        wait_for_slot(slow_lab, job_id)
    assert slow_lab.post(leaving, "cancel").json()["status"] == "cancelled"
    assert slow_lab.rows.seconds_until_device_was_free(leaving) < 10
    slow_lab.succeed(staying)
    assert slow_lab.rows.attempt_count(staying) == 1
