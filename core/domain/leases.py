"""Leases: a worker's hold on a job, and the error for acting on a hold that is over."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from core.domain.errors import DomainError


@dataclass(frozen=True)
class Lease:
    """One worker's hold on one job, fenced by `token`."""

    job_id: uuid.UUID
    tenant_id: uuid.UUID
    token: int


class StaleLeaseError(DomainError):
    """This attempt no longer holds the job: another outcome, or another worker, came first."""

    default_code = "stale_lease"
