"""What was used: GPU-seconds, trained tokens and jobs, summed by tenant, by pool or by day. For operators.

An attempt is counted when it ends, on the day (UTC) of its end, whether it was charged or not.
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
# The label of a row, and what joins it.
_LABELS = {
    "tenant": "t.slug",
    "pool": "u.pool",
    "day": "to_char(u.created_at at time zone 'UTC', 'YYYY-MM-DD')",
}
# Summed up by job first: to sort all attempts for the count of their jobs takes longer than all the rest.
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
    """What usage is summed by."""

    TENANT = "tenant"
    POOL = "pool"
    DAY = "day"


@dataclass(frozen=True)
class UsagePeriod:
    """Whole days (UTC), both included. Raises InvalidRequestError where the first is after the last, or too far off."""

    first: dt.date
    last: dt.date

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise InvalidRequestError(f"The period ends on {self.last}, before it begins.", param="from")
        if (self.last - self.first).days >= MAX_DAYS:
            raise InvalidRequestError(f"A period has {MAX_DAYS} days at most.", param="from")

    @classmethod
    def of(cls, first: dt.date | None, last: dt.date | None, *, now: dt.datetime) -> UsagePeriod:
        """Return the period of what is given: to today, and from the first of the last day's month, by default."""
        last = last or now.astimezone(dt.UTC).date()
        return cls(first or last.replace(day=1), last)


@dataclass(frozen=True)
class UsageTotal:
    """What one tenant, pool or day has used; `label` is the slug, the pool's name, or the day."""

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
