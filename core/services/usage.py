"""Sums of usage, for operators: GPU-seconds, trained tokens and jobs, by tenant, by pool or by day.

An attempt counts once it has ended, on the day (UTC) of its end, whether it was charged or not.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import text

from core.db.session import OperatorSession
from core.domain.errors import InvalidRequestError
from core.domain.values import Page

MAX_DAYS = 366
# The SQL of a row's label. `_JOINS` has the join that it needs.
_LABELS = {
    "tenant": "t.slug",
    "pool": "u.pool",
    "day": "to_char(u.created_at at time zone 'UTC', 'YYYY-MM-DD')",
}
# Summed by job first. A distinct count of jobs would sort all attempts, which takes longer than the rest of the query.
_TOTALS = """
select label, sum(gpu_seconds) as gpu_seconds, sum(trained_tokens)::bigint as trained_tokens, count(*) as num_jobs,
    sum(num_attempts)::bigint as num_attempts
from (
    select {label} as label, u.job_id, sum(u.gpu_seconds) as gpu_seconds, sum(u.trained_tokens) as trained_tokens,
        count(*) as num_attempts
    from operator_usage u {join}
    where u.created_at >= :since and u.created_at <= :until and {label} > :after
    group by 1, 2
) of_jobs
group by 1 order by 1 limit :num
"""
_JOINS = {"tenant": "join tenants t on t.id = u.tenant_id"}


class UsageGroup(StrEnum):
    """What usage is summed by.

    - `tenant`: One sum for each organization.
    - `pool`: One sum for each pool.
    - `day`: One sum for each day (UTC).
    """

    TENANT = "tenant"
    POOL = "pool"
    DAY = "day"


@dataclass(frozen=True)
class UsagePeriod:
    """Whole days (UTC), both included. Raises InvalidRequestError if they are in the wrong order or too far apart."""

    first: dt.date
    last: dt.date

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise InvalidRequestError(f"The period ends on {self.last}, before it begins.", param="from")
        if (self.last - self.first).days >= MAX_DAYS:
            raise InvalidRequestError(f"A period has {MAX_DAYS} days at most.", param="from")

    @classmethod
    def of(cls, first: dt.date | None, last: dt.date | None, *, now: dt.datetime) -> UsagePeriod:
        """Return the given period. By default it ends today, and starts on the first of its last day's month."""
        last = last or now.astimezone(dt.UTC).date()
        return cls(first or last.replace(day=1), last)


@dataclass(frozen=True)
class UsageTotal:
    """The usage of one tenant, pool or day. `label` is the slug, the pool's name or the day."""

    label: str
    gpu_seconds: float
    trained_tokens: int
    num_jobs: int
    num_attempts: int


def sum_usage(
    session: OperatorSession, period: UsagePeriod, *, group: UsageGroup, after: str | None = None, limit: int
) -> Page[UsageTotal]:
    """Return the sums of a period, in the order of their labels."""
    query = _TOTALS.format(label=_LABELS[group], join=_JOINS.get(group, ""))
    values = {
        "since": dt.datetime.combine(period.first, dt.time(), dt.UTC),
        "until": dt.datetime.combine(period.last, dt.time.max, dt.UTC),
        "after": after or "",
        "num": limit + 1,
    }
    rows = session.execute(text(query), values).all()
    return Page.cut([UsageTotal(*row) for row in rows], limit)
