"""Log lines of jobs, in names and numbers. Only the job's tenant can read them.

A line names its job by the lease token under which it was written, and takes its tenant from that attempt's row. So no
worker can write into another tenant's log, and no log of a whole process has to be split by tenant.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import insert, literal, select
from sqlalchemy.dialects.postgresql import JSONB

from core.db.models import Attempt, LogLine
from core.db.session import ServiceSession, TenantSession
from core.domain.ids import IdKind, new_id, not_found
from core.domain.values import Page

LogLevel = Literal["info", "warn", "error"]
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class LogFilter:
    """Selects lines of a job: those after the line `after`, and only those of one attempt if it is named."""

    attempt_number: int | None
    after: uuid.UUID | None
    limit: int


def record_log_line(
    session: ServiceSession, lease_token: int, *, name: str, level: LogLevel, details: Mapping[str, Scalar]
) -> None:
    """Append a line to the log of the attempt with this lease token. Without such an attempt nothing is stored."""
    attempt = select(
        literal(new_id()),
        Attempt.tenant_id,
        Attempt.job_id,
        Attempt.number,
        literal(level),
        literal(name),
        literal(dict(details), JSONB),
    ).where(Attempt.lease_token == lease_token)
    columns = ["id", "tenant_id", "job_id", "attempt_number", "level", "name", "details"]
    session.execute(insert(LogLine).from_select(columns, attempt))


def list_log_lines(
    session: TenantSession, tenant_id: uuid.UUID, *, job_id: uuid.UUID, wanted: LogFilter
) -> Page[LogLine]:
    """Return a job's lines, oldest first."""
    own = (LogLine.tenant_id == tenant_id, LogLine.job_id == job_id)
    query = select(LogLine).where(*own)
    if wanted.attempt_number is not None:
        query = query.where(LogLine.attempt_number == wanted.attempt_number)
    if wanted.after is not None:
        number = session.scalar(select(LogLine.number).where(*own, LogLine.id == wanted.after))
        if number is None:
            raise not_found(IdKind.LOG_LINE, wanted.after, param="after")
        query = query.where(LogLine.number > number)
    return Page.cut(session.scalars(query.order_by(LogLine.number).limit(wanted.limit + 1)).all(), wanted.limit)
