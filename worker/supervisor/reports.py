"""The trainer's reports, until the database has them: taken in order, recorded in order, and never lost in between.

Progress is recorded at once, for all jobs in one transaction. A report that names artifacts is recorded after they were
read back from the object store. The end of an attempt keeps its place behind such reports. While the database is away,
both kinds wait here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import structlog
from sqlalchemy import Engine

from core.crashpoints import CrashPoint, reach
from core.db.session import service_transaction
from core.domain.leases import StaleLeaseError
from core.services import attempts
from core.services.set_asides import ROW_ERRORS
from core.storage import ObjectStore, StorageUnavailableError
from worker.messages import (
    CheckpointSaved,
    DatasetsRead,
    DeviceLeft,
    EvaluationDone,
    JobFailed,
    JobLogged,
    JobStarted,
    JobSucceeded,
    JobWarned,
    JobYielded,
    PhaseDone,
    Report,
    ResumePointSaved,
    SlotRefused,
    StepDone,
    StepSkipped,
    UrlsGranted,
    UrlsWanted,
    UsageCounted,
)
from worker.supervisor.artifacts import ArtifactProver, Proof, grant_uploads
from worker.supervisor.bases import BaseHolder
from worker.supervisor.departures import Departures
from worker.supervisor.failures import DAMAGED, UNCONFIRMED, UNRECORDABLE
from worker.supervisor.held_jobs import HeldJob, HeldJobs
from worker.supervisor.metrics import FENCED_WRITES, count_phase, count_use
from worker.supervisor.records import ProgressReport, record_progress, record_proof
from worker.supervisor.signing import Signing

log = structlog.get_logger()
_POLL_SECONDS = 0.1
_MAX_REPORTS = 500  # taken in one round of the loop
_OUTCOMES = {"job_succeeded": "succeeded", "job_failed": "failed", "job_yielded": "given_back"}


class ReportKeeper:
    """Keeps each report of a held job until it is recorded. Drops reports of jobs that are no longer held."""

    def __init__(
        self,
        engine: Engine,
        *,
        signing: Signing,
        prover: ArtifactProver,
        base: BaseHolder,
        jobs: HeldJobs,
        departures: Departures,
    ) -> None:
        self._engine = engine
        self._signing = signing
        self._base = base
        self._jobs = jobs
        self._departures = departures
        self._prover = prover
        self._unrecorded: list[tuple[HeldJob, ProgressReport]] = []
        self._unpublished: Proof | None = None
        self._ungranted: dict[tuple[int, str], UrlsWanted] = {}  # by lease token and artifact

    def take(self) -> None:
        """Take the trainer's reports, and wait shortly for a first one. Raises TrainerGoneError."""
        report = self._base.receive(timeout_seconds=_POLL_SECONDS)
        for _ in range(_MAX_REPORTS):
            if report is None:
                return
            self._take(report)
            report = self._base.receive(timeout_seconds=0)
        if report is not None:
            self._take(report)

    def grant_wanted(self) -> None:
        """Grant URLs to the uploads that wait for them. Without keys to sign with, the questions are kept."""
        if self._ungranted:
            self._signing.attempt(self._grant_all)

    def record_progress(self) -> None:
        """Record the progress of all jobs in one transaction, so that a step of many jobs costs one commit.

        If one report cannot be recorded, each is recorded alone, and the one that fails ends its attempt.
        """
        try:
            self._record(self._unrecorded)
        except ROW_ERRORS:
            self._record_one_by_one()
        self._unrecorded.clear()

    def publish_proofs(self) -> None:
        """Record the artifacts that were read back since, and the ends of attempts behind them."""
        while (proof := self._unpublished or self._prover.take()) is not None:
            self._unpublished = proof  # kept until the database has it
            self._publish(proof)
            self._unpublished = None

    def _take(self, report: Report) -> None:
        if isinstance(report, DeviceLeft):
            self._departures.note(report.lease_token)
        held = self._jobs.find(getattr(report, "lease_token", -1))  # some reports belong to no job
        if held is None:
            return
        match report:
            case (
                DatasetsRead()
                | JobStarted()
                | StepDone()
                | StepSkipped()
                | EvaluationDone()
                | JobWarned()
                | JobLogged()
            ):
                held.note_progress(report)
                self._unrecorded.append((held, report))
            case UrlsWanted():
                self._ungranted[report.lease_token, report.artifact] = report
            case UsageCounted():
                count_use(held.pool, held.usage, report)
                held.usage = report
            case PhaseDone():
                self._note_phase(held, report)
            case SlotRefused():
                held.wants_memory = True
            case CheckpointSaved() | ResumePointSaved():
                self._prover.submit(held.lease, report)
            case JobSucceeded() | JobFailed() | JobYielded():
                held.is_delivered = True
                self._prover.submit(held.lease, report)

    def _grant_all(self, store: ObjectStore) -> None:
        for place, wanted in tuple(self._ungranted.items()):
            held = self._jobs.find(wanted.lease_token)
            if held is not None:
                urls = grant_uploads(store, held.lease, artifact=wanted.artifact, names=wanted.names)
                self._base.send(UrlsGranted(lease_token=wanted.lease_token, artifact=wanted.artifact, urls=urls))
            del self._ungranted[place]

    def _note_phase(self, held: HeldJob, done: PhaseDone) -> None:
        count_phase(done)
        attributes = {} if done.artifact is None else {"espalier.artifact": done.artifact}
        held.trace.add_phase(done.phase, began_at=done.began_at, seconds=done.seconds, attributes=attributes)

    def _record_one_by_one(self) -> None:
        while self._unrecorded:
            held, _ = self._unrecorded[0]
            try:
                self._record(self._unrecorded[:1])
            except ROW_ERRORS as error:
                self._fail_unrecordable(held, error)
            self._unrecorded.pop(0)

    def _record(self, reports: Sequence[tuple[HeldJob, ProgressReport]]) -> None:
        """Record reports in one transaction. A stale lease ends neither it nor the reports of other jobs."""
        if not reports:
            return
        spent: list[str] = []
        stale: set[int] = set()
        acquitted: dict[int, bool] = {}  # by lease token, whether another suspect waits for its turn
        with service_transaction(self._engine) as session:
            for held, report in reports:
                token = held.lease.token
                try:
                    if token not in stale:
                        spent += record_progress(session, held.lease, report)
                        if token not in acquitted and held.is_acquitted_by(report):
                            acquitted[token] = attempts.acquit_job(session, held.lease)
                except StaleLeaseError:
                    stale.add(token)
        # Only after the commit: until then a row names the prefixes, and no job is acquitted.
        self._prover.delete_prefixes(tuple(spent))
        for token in stale:
            FENCED_WRITES.inc()
            self._jobs.lose_lease(self._jobs.find(token))
        for token, must_make_room in acquitted.items():
            self._acquit(self._jobs.find(token), must_make_room=must_make_room)

    def _acquit(self, held: HeldJob | None, *, must_make_room: bool) -> None:
        if held is not None:
            log.info("job.acquitted", **held.ids)
            held.suspect_step = None
            if must_make_room:
                self._jobs.give_back(held)

    def _publish(self, proof: Proof) -> None:
        held = self._jobs.find(proof.lease.token)
        if held is None:
            return
        try:
            if proof.error is not None:
                self._report_unproven(held, proof)
                return
            # If the worker dies before this commit, nothing is published. If it dies after it, everything is.
            if isinstance(proof.report, JobSucceeded):
                reach(CrashPoint.PRE_FINISH)
            with service_transaction(self._engine) as session:
                spent = record_proof(session, proof, result_filename=held.result_filename)
            if isinstance(proof.report, JobSucceeded):
                reach(CrashPoint.POST_FINISH)
            self._prover.delete_prefixes(spent)
        except StaleLeaseError:
            FENCED_WRITES.inc()
            self._jobs.lose_lease(held)
            return
        except ROW_ERRORS as error:
            self._fail_unrecordable(held, error)
            return
        if isinstance(proof.report, JobSucceeded | JobFailed | JobYielded):
            log.info("job.left", **held.ids, reason=proof.report.kind)
            self._jobs.drop(held, outcome=_OUTCOMES[proof.report.kind])

    def _fail_unrecordable(self, held: HeldJob, error: Exception) -> None:
        """End an attempt whose report the database refuses. If it refuses this too, the lease expires."""
        log.error("report.unrecordable", **held.ids, error=type(error).__name__)
        with contextlib.suppress(StaleLeaseError, *ROW_ERRORS), service_transaction(self._engine) as session:
            attempts.fail_attempt(session, held.lease, failure=UNRECORDABLE, is_job_fault=False)
        self._jobs.drop(held, outcome="failed")

    def _report_unproven(self, held: HeldJob, proof: Proof) -> None:
        log.warning("artifact.unconfirmed", **held.ids, error=str(proof.error))
        with service_transaction(self._engine) as session:
            if isinstance(proof.report, ResumePointSaved):
                message = f"The resume point of step {proof.report.step} could not be confirmed."
                attempts.record_message(session, held.lease, message=message, level="warn")
                return
            if isinstance(proof.error, StorageUnavailableError):
                attempts.postpone_attempt(session, held.lease, failure=UNCONFIRMED)
            else:
                attempts.fail_attempt(session, held.lease, failure=DAMAGED, is_job_fault=False)
        self._jobs.drop(held, outcome="failed")
