"""The schedule's Prometheus metrics. The leading schedule counts the whole queue in one statement for each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import structlog
from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Engine

from core.db.session import DATABASE_ERRORS, service_transaction
from core.services.census import Count, take_census

log = structlog.get_logger()

LEASES_EXPIRED = Counter("espalier_leases_expired", "Leases that ran out: their workers were not heard of in time.")
POOLS_WOKEN = Counter("espalier_pools_woken", "Wake-ups sent to workers.", ("pool",))
OBJECTS_DELETED = Counter("espalier_objects_deleted", "What was deleted from the object store.", ("duty",))
ROWS_DELETED = Counter("espalier_rows_deleted", "Rows that went because of their age or with a deleted job.", ("kind",))
DUTY_SECONDS = Histogram(
    "espalier_duty_seconds",
    "Seconds that a duty of the schedule took.",
    ("duty",),
    buckets=(0.005, 0.025, 0.1, 0.5, 2.5, 10, 60, 600),
)


class QueueCollector(Collector):
    """Shows whether this schedule leads. If it leads, shows the waiting jobs and the workers too."""

    def __init__(self, engine: Engine, *, is_leader: Callable[[], bool]) -> None:
        self._engine, self._is_leader = engine, is_leader

    def describe(self) -> Iterator[Metric]:
        """Name no metrics at registration: the registry would take a census for that."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        is_leader = self._is_leader()
        leads = "Whether this schedule leads, and does the duties."
        yield GaugeMetricFamily("espalier_schedule_leads", leads, value=is_leader)
        if not is_leader:
            return
        counts: Sequence[Count] = ()
        try:
            with service_transaction(self._engine) as session:
                counts = take_census(session)
        except DATABASE_ERRORS as error:
            log.warning("database.unavailable", error=type(error).__name__)
        seen = "Whether the database answered the schedule's look at the queue, without which its figures are missing."
        yield GaugeMetricFamily("espalier_queue_seen", seen, value=bool(counts))
        yield from _as_metrics(counts)


def _as_metrics(counts: Sequence[Count]) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("espalier_queue_jobs", "Unfinished jobs.", labels=("pool", "state"))
    ages = GaugeMetricFamily(
        "espalier_queue_oldest_seconds",
        "How long the oldest of these jobs has waited, or since when it has been running.",
        labels=("pool", "state"),
    )
    claimable = GaugeMetricFamily(
        "espalier_queue_claimable_jobs", "Queued jobs that their tenants may start now.", labels=("pool",)
    )
    claimable_ages = GaugeMetricFamily(
        "espalier_queue_claimable_oldest_seconds", "How long the oldest of these has waited.", labels=("pool",)
    )
    wanted = GaugeMetricFamily(
        "espalier_pool_workers_wanted", "Workers that claimable and running jobs would fill.", labels=("pool",)
    )
    pools = GaugeMetricFamily(
        "espalier_pool_workers", "Workers that are alive and may serve the pool.", labels=("pool",)
    )
    workers = GaugeMetricFamily("espalier_workers", "Workers that are alive.", labels=("state",))
    set_asides = GaugeMetricFamily("espalier_set_asides", "Rows that a duty could not do.", labels=("duty",))
    for each in counts:
        match each.subject:
            case "jobs":
                jobs.add_metric((each.pool, each.state), each.num)
                if each.state != "paused":
                    ages.add_metric((each.pool, each.state), each.oldest_seconds)
            case "claimable":
                claimable.add_metric((each.pool,), each.num)
                claimable_ages.add_metric((each.pool,), each.oldest_seconds)
            case "workers_wanted":
                wanted.add_metric((each.pool,), each.num)
            case "pool_workers":
                pools.add_metric((each.pool,), each.num)
            case "workers":
                workers.add_metric((each.state,), each.num)
            case "set_asides":
                set_asides.add_metric((each.state,), each.num)
    return iter((jobs, ages, claimable, claimable_ages, wanted, pools, workers, set_asides))
