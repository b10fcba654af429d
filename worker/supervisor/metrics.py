"""The worker's Prometheus metrics. The trainer has no port for scrapes, so its figures come over the pipe.

Labels are pools, phases and codes of the service's own, never a tenant or a job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core.db.models import Job
from core.domain.workers import WorkerFacts
from worker.messages import DeviceFigures, PhaseDone, UsageCounted
from worker.supervisor.failures import TRAINER_DEATH_CODES

_WAIT_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PHASE_BUCKETS = (0.01, 0.1, 0.5, 2.5, 10, 60, 300, 1800, 4 * 3600)

CLAIM_SECONDS = Histogram("espalier_claim_seconds", "Seconds that the transaction of a claim took.")
JOB_WAIT_SECONDS = Histogram(
    "espalier_job_wait_seconds",
    "Claim latency: from when a job could be claimed to its claim.",
    ("pool",),
    buckets=_WAIT_BUCKETS,
)
FIRST_STEP_SECONDS = Histogram(
    "espalier_first_step_seconds", "Seconds from a claim to the attempt's first step.", ("pool",), buckets=_WAIT_BUCKETS
)
STEP_SECONDS = Histogram("espalier_step_seconds", "Seconds of a fused step.", ("pool",), buckets=_STEP_BUCKETS)
PHASE_SECONDS = Histogram(
    "espalier_phase_seconds", "Seconds of an attempt's phases.", ("phase",), buckets=_PHASE_BUCKETS
)
TOKENS = Counter("espalier_trained_tokens", "Tokens trained, padding excluded.", ("pool",))
GPU_SECONDS = Counter("espalier_gpu_seconds", "Seconds of the device that jobs have used.", ("pool",))
FLOPS = Counter("espalier_model_flops", "FLOP of the base's products for the tokens trained and scored.", ("pool",))
ARTIFACTS = Counter("espalier_artifact_uploads", "Artifacts uploaded.", ("kind",))
ARTIFACT_BYTES = Counter("espalier_artifact_upload_bytes", "Bytes of the artifacts uploaded.", ("kind",))
ATTEMPTS_ENDED = Counter("espalier_attempts_ended", "Attempts that ended here.", ("pool", "outcome"))
TRAINERS_LOST = Counter("espalier_trainers_lost", "Trainers that died or were stopped as stalled.", ("code",))
BASE_LOAD_SECONDS = Histogram(
    "espalier_base_load_seconds",
    "Seconds from a trainer's start to its base loaded.",
    ("pool",),
    buckets=_PHASE_BUCKETS,
)
for _code in TRAINER_DEATH_CODES:  # zero from the start, so that the first death is an increase
    TRAINERS_LOST.labels(_code)
SELF_FENCES = Counter(
    "espalier_self_fences", "Times that the worker stopped its trainer, out of touch with the database."
)
FENCED_WRITES = Counter(
    "espalier_fenced_writes", "Writes refused because the lease was over: cancelled, or another worker's."
)


def observe_wait(job: Job, *, lease_seconds: float) -> None:
    """Record how long a job that was just claimed had waited, by the database's clock alone."""
    assert job.lease_until is not None
    claimed_at = job.lease_until.timestamp() - lease_seconds
    JOB_WAIT_SECONDS.labels(job.pool).observe(max(0.0, claimed_at - job.run_after.timestamp()))


def count_use(pool: str, before: UsageCounted | None, now: UsageCounted) -> None:
    """Count a job's use since it was last counted."""
    GPU_SECONDS.labels(pool).inc(max(0.0, now.gpu_seconds - (before.gpu_seconds if before else 0.0)))
    TOKENS.labels(pool).inc(max(0, now.trained_tokens - (before.trained_tokens if before else 0)))


def count_phase(done: PhaseDone) -> None:
    PHASE_SECONDS.labels(done.phase).observe(done.seconds)
    if done.artifact is not None:
        kind = done.artifact.partition("/")[0]
        ARTIFACTS.labels(kind).inc()
        ARTIFACT_BYTES.labels(kind).inc(done.size_bytes)


def count_steps(pool: str, figures: DeviceFigures) -> None:
    steps = STEP_SECONDS.labels(pool)
    for seconds in figures.step_seconds:
        steps.observe(seconds)
    FLOPS.labels(pool).inc(figures.flops)


class WorkerCollector(Collector):
    """Shows what the worker holds at the moment of the scrape."""

    def __init__(
        self, describe: Callable[[], WorkerFacts], *, find_figures: Callable[[], DeviceFigures | None]
    ) -> None:
        self._describe, self._find_figures = describe, find_figures

    def describe(self) -> Iterator[Metric]:
        """Name no metrics at registration: the registry would collect them for that."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        facts = self._describe()
        yield _gauge("espalier_base_refusals", "Pools whose bases this worker cannot load.", len(facts.refusals))
        if facts.clock_offset_seconds is not None:
            ahead = "Seconds by which this host's clock is ahead of the database's."
            yield _gauge("espalier_worker_clock_offset_seconds", ahead, facts.clock_offset_seconds)
        if facts.pool is None:
            return
        pool = {"pool": facts.pool}
        yield _gauge("espalier_slots", "Slots of the base that is held.", facts.slots, pool)
        yield _gauge("espalier_slots_in_use", "Slots that jobs are in.", facts.slots_in_use, pool)
        if (figures := self._find_figures()) is not None:
            yield from _describe_device(pool, figures)


def _describe_device(pool: dict[str, str], figures: DeviceFigures) -> Iterator[Metric]:
    device = pool | {"device": figures.device}
    used = "Memory in use: of a GPU by everybody, of a machine's own by the trainer."
    yield _gauge("espalier_device_memory_used_bytes", used, figures.memory_used_bytes, device)
    yield _gauge("espalier_device_memory_bytes", "Memory that there is.", figures.memory_total_bytes, device)
    preparing = "Tokenising backlog: jobs that hold a slot's place while their datasets are fetched and tokenised."
    yield _gauge("espalier_jobs_preparing", preparing, figures.num_preparing, pool)
    waiting = "Jobs that are ready and wait for memory of the device."
    yield _gauge("espalier_jobs_waiting_for_memory", waiting, figures.num_waiting, pool)
    if figures.peak_flops is not None:
        yield _gauge("espalier_device_peak_flops", "The maker's FLOP a second.", figures.peak_flops, device)


def _gauge(name: str, documentation: str, value: float, labels: dict[str, str] | None = None) -> GaugeMetricFamily:
    names = labels or {}
    family = GaugeMetricFamily(name, documentation, labels=tuple(names))
    family.add_metric(tuple(names.values()), value)
    return family
