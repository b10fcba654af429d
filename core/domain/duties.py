"""What the service does row by row for all tenants, and must go on doing when one row cannot be done."""

from __future__ import annotations

from enum import StrEnum


class Duty(StrEnum):
    """Each names the rows it sets aside: a job, but for what is purged, a job or a tenant swept, an attempt settled."""

    CLAIM = "claim"
    EXPIRE = "expire"
    PURGE = "purge"
    SWEEP = "sweep"
    SETTLE = "settle"
    FORGET = "forget"
    ERASE = "erase"


# A row that is set aside is tried again after so long, twice as long each time it fails again, an hour at most.
FIRST_REST_SECONDS = 60.0
LONGEST_REST_SECONDS = 3600.0
