"""A trainer keeps nothing of ended jobs: its long-lived data is as large after many jobs as after a few."""

from __future__ import annotations

import gc
from collections import Counter, deque
from contextlib import suppress
from typing import Any

from tests.integration.trainer.object_store import Store
from tests.integration.trainer.supervision import Supervisor, make_order
from tests.waiting import wait_until
from worker.messages import JobFailed, JobSucceeded, JobYielded, ResumePointSaved, StopJob, YieldJob

OURS = frozenset({"api", "core", "worker"})
RANKS = (4, 8, 16)
NUM_ROUNDS = 5
NUM_MORE_ROUNDS = 10
SETTLING_SECONDS = 30.0


class Days:
    """Rounds of four jobs: one that succeeds, one that fails, one that is stopped, one that is given back."""

    def __init__(self, supervisor: Supervisor, store: Store) -> None:
        self._supervisor, self._store = supervisor, store
        self._num_jobs = 0

    def live_through(self, num_rounds: int) -> None:
        for _ in range(num_rounds):
            self._succeed()
            self._fail()
            self._leave(StopJob)
            self._leave(YieldJob)
        wait_until(lambda: not self._supervisor.loop._jobs, what="the last job's end")
        self._supervisor.reports.clear()
        self._store.objects.clear()
        self._store.fetched.clear()

    def _start(self, *, num_rows: int = 2, n_epochs: int = 2) -> int:
        self._num_jobs = number = self._num_jobs + 1
        rows = self._store.add_rows(f"rows-{number}", num_rows=num_rows)
        order = make_order(rows, lease_token=number, n_epochs=n_epochs, seed=number, rank=RANKS[number % len(RANKS)])
        validation = rows if number % 2 else None
        self._supervisor.send(order.model_copy(update={"tenant_id": f"tenant-{number}", "validation_file": validation}))
        return number

    def _succeed(self) -> None:
        self._supervisor.wait_for(JobSucceeded, self._start())

    def _fail(self) -> None:
        self._supervisor.wait_for(JobFailed, self._start(num_rows=0))

    def _leave(self, order: type[StopJob | YieldJob]) -> None:
        number = self._start(n_epochs=50)
        self._supervisor.wait_for(ResumePointSaved, number)
        self._supervisor.send(order(lease_token=number))
        if order is YieldJob:
            self._supervisor.wait_for(JobYielded, number)


def count_objects() -> Counter[str]:
    """Count the living objects of our own classes."""
    gc.collect()
    kinds = [type(each) for each in gc.get_objects()]
    return Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds if is_ours(kind))


def is_ours(kind: type) -> bool:
    return str(kind.__module__).partition(".")[0] in OURS


def measure(*roots: Any) -> Counter[str]:
    """Return the lengths of the collections that our objects hold, by where they are, from these objects on."""
    found: Counter[str] = Counter()
    seen: set[int] = set()
    pending = [(type(root).__name__, root) for root in roots]
    while pending:
        place, each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, dict | list | set | deque):
            found[place] += len(each)
            pending += [(f"{place}[]", member) for member in (each.values() if isinstance(each, dict) else each)]
        elif any(map(is_ours, type(each).__mro__)):
            pending += [(f"{place}.{name}", value) for name, value in getattr(each, "__dict__", {}).items()]
    return found


def test_nothing_of_jobs_that_have_ended_is_kept(supervisor: Supervisor, store: Store) -> None:
    def take_stock() -> Counter[str]:
        return count_objects() + measure(supervisor.loop, supervisor._channel, supervisor.engine)

    days = Days(supervisor, store)
    days.live_through(NUM_ROUNDS)
    before = take_stock()
    looked_at = measure(supervisor.loop, supervisor._channel, supervisor.engine).keys()
    assert {"FaultyEngine._slots", "TrainingLoop._jobs", "Channel._grants"} <= looked_at
    assert before["worker.trainer.loop.TrainingLoop"] >= 1  # those of other tests may still live
    days.live_through(NUM_MORE_ROUNDS)
    with suppress(AssertionError):  # the loop and its threads hold their last piece of work until they look again
        wait_until(lambda: not take_stock() - before, patience_seconds=SETTLING_SECONDS)
    assert take_stock() - before == Counter()
