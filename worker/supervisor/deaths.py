"""Decides, for each job of a trainer that has died: is it charged the attempt, and is it tried alone?

Each attempt that was in the trainer is settled once, however long the database was away. If several jobs were in it, no
one can tell which of them killed it. So none is charged, and each is tried alone. The job that kills trainers then dies
alone, is charged, and stays alone until it has no attempt left. A job that comes under suspicion again and again is no
longer acquitted, so that this ends.

| event | charged? | next |
|---|---|---|
| it dies with one job in it, whose next attempt would end the same (`is_final_alone`) | yes | the job fails |
| it dies with one job in it, otherwise | yes | suspect: tried alone; fails when no attempt is left |
| it dies with several jobs in it | no | each is a suspect, with one suspicion more: tried alone |
| the same, after `MAX_UNCOUNTED` uncounted attempts without a new step | yes | the same, while an attempt is left |
| it dies before it was sent a job that is held | no | the job is queued again |
| it dies after it has reported a job's end | no | the job ends as reported, once its files are read back |
| this worker stopped it, out of touch with the database (`LEASE_LOST`) | no | the job is queued again |
| a suspect gets more than `ACQUITTAL_STEPS` beyond the step of the death | - | acquitted: trained beside others |
| the same, while another suspect of its pool waits | - | acquitted, and given back, so that the other has its turn |
| the same, after `MAX_SUSPICIONS` suspicions | - | a suspect still: it trains alone to its end |

An idle worker claims a suspect at once. A busy worker claims one that has waited long (core.services.claims).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import structlog
from sqlalchemy import Engine

from core.db.session import service_transaction
from core.domain.failures import LEASE_LOST, Failure
from core.domain.leases import StaleLeaseError
from core.services import attempts
from worker.supervisor.failures import is_final_alone
from worker.supervisor.held_jobs import HeldJob, HeldJobs
from worker.supervisor.lease import LeaseKeeper
from worker.supervisor.metrics import TRAINERS_LOST

log = structlog.get_logger()


@dataclass(frozen=True)
class TrainerDeath:
    """Why a trainer has ended, and whether several jobs were in it."""

    failure: Failure
    is_shared: bool


class DeathSettler:
    """Holds the death that is not settled yet. While there is one, no job may be claimed."""

    def __init__(self, engine: Engine, *, jobs: HeldJobs, keeper: LeaseKeeper) -> None:
        self._engine = engine
        self._jobs = jobs
        self._keeper = keeper
        self._death: TrainerDeath | None = None

    @property
    def is_settled(self) -> bool:
        return self._death is None

    def note(self, failure: Failure) -> None:
        """Note that the trainer is dead, and which of the held jobs were in it."""
        num_jobs = sum(held.order is None and not held.is_delivered for held in self._jobs)
        failure = LEASE_LOST if self._keeper.is_fenced else failure
        log.error("trainer.lost", code=failure.code, num_jobs=num_jobs)
        TRAINERS_LOST.labels(failure.code).inc()
        self._death = TrainerDeath(failure, is_shared=num_jobs > 1)

    def settle(self) -> None:
        """End the attempts that a dead trainer took with it. Raises the database's errors; a later call continues."""
        if self._death is None:
            return
        for held in self._jobs:
            if not held.is_delivered:
                self._end_attempt(held, self._death)
        self._death = None

    def _end_attempt(self, held: HeldJob, death: TrainerDeath) -> None:
        if death.failure is LEASE_LOST or held.order is not None:
            self._jobs.requeue(held)
            return
        with contextlib.suppress(StaleLeaseError), service_transaction(self._engine) as session:
            if death.is_shared:
                attempts.suspect_attempt(session, held.lease, failure=death.failure)
            else:
                is_final = is_final_alone(death.failure)
                attempts.fail_attempt(
                    session, held.lease, failure=death.failure, is_job_fault=is_final, is_suspect=True
                )
        self._jobs.drop(held, outcome="trainer_lost")
