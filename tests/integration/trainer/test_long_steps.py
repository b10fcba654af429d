"""During a long step the trainer obeys orders and reports that it is alive."""

from __future__ import annotations

import pytest

from tests.integration.trainer.object_store import Store
from tests.integration.trainer.supervision import HeldStep, Supervisor, make_order
from tests.waiting import PATIENCE_SECONDS, wait_until
from worker.messages import (
    Alive,
    DeviceLeft,
    JobStarted,
    JobSucceeded,
    JobYielded,
    StepDone,
    StopJob,
    UsageCounted,
    YieldJob,
)


@pytest.mark.fault(43)
@pytest.mark.parametrize("product", ["multiply", "multiply_back"])
@pytest.mark.parametrize("order", [StopJob, YieldJob])
def test_an_order_that_comes_in_the_middle_of_a_step_is_obeyed_before_its_end(
    supervisor: Supervisor,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    order: type[StopJob | YieldJob],
    product: str,
) -> None:
    held = HeldStep(monkeypatch, product=product)
    supervisor.send(make_order(store.add_rows("rows", num_rows=20), n_epochs=50))
    held.has_begun.wait()
    supervisor.send(order(lease_token=1))
    wait_until(lambda: not supervisor.has_obeyed)
    held.may_go_on.set()
    supervisor.wait_for(DeviceLeft)
    assert not supervisor.told(StepDone)
    supervisor.send(make_order(store.add_rows("next"), lease_token=2))
    supervisor.wait_for(JobSucceeded, 2)
    assert {report.lease_token for report in supervisor.told(StepDone)} == {2}
    assert bool(supervisor.told(JobYielded)) == (order is YieldJob)


@pytest.mark.parametrize("order", [StopJob, YieldJob])
def test_a_job_that_leaves_within_a_step_of_others_is_billed_its_part_of_the_step(
    supervisor: Supervisor, store: Store, monkeypatch: pytest.MonkeyPatch, order: type[StopJob | YieldJob]
) -> None:
    monkeypatch.setattr("worker.engine.steps.PATIENCE_SECONDS", PATIENCE_SECONDS)  # the step is not given up
    held = HeldStep(monkeypatch, is_due=lambda: set(supervisor.engine.running_names) == {"1", "2"})
    rows = store.add_rows("rows", num_rows=100)
    for number in (1, 2):
        supervisor.send(make_order(rows, lease_token=number, n_epochs=50))
    held.has_begun.wait()
    supervisor.wait_for(JobStarted, 2)
    supervisor.send(order(lease_token=2))
    wait_until(lambda: not supervisor.has_obeyed)
    held.may_go_on.set()
    supervisor.wait_for(DeviceLeft, 2)
    if order is YieldJob:
        supervisor.wait_for(JobYielded, 2)
    supervisor.send(StopJob(lease_token=1))
    supervisor.wait_for(DeviceLeft, 1)
    told = [report for report in supervisor.reports if isinstance(report, UsageCounted | JobYielded)]
    billed = [report for report in told if report.lease_token == 2]
    if order is YieldJob:
        assert isinstance(billed.pop(), JobYielded), "nothing is counted any more after it"
    assert isinstance(billed[-1], UsageCounted)
    assert billed[-1].gpu_seconds > 0


def test_a_step_that_goes_on_for_long_shows_that_it_lives(
    supervisor: Supervisor, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldStep(monkeypatch)
    supervisor.send(make_order(store.add_rows("rows"), n_epochs=1))
    held.has_begun.wait()
    monkeypatch.setattr("worker.trainer.loop._LIFE_SECONDS", 0.0)  # as if the step had gone on for longer
    held.may_go_on.set()
    started = supervisor.reports.index(supervisor.wait_for(JobStarted))
    done = supervisor.reports.index(supervisor.wait_for(StepDone))
    alive = [report for report in supervisor.reports[started:done] if isinstance(report, Alive)]
    assert len(alive) > 3, "at every look within the step, and not only before it"
