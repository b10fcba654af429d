"""What the service does row by row for all tenants, and must continue when one row fails (core.services.set_asides)."""

from __future__ import annotations

from enum import StrEnum


class Duty(StrEnum):
    """The kinds of this work, with the rows that each may set aside.

    | duty | sets aside |
    |---|---|
    | claim, expire, forget | a job |
    | purge | what is purged: a file, an upload, an adapter, a checkpoint or a resume point |
    | sweep, erase | a job or a tenant |
    | settle | an attempt |
    """

    CLAIM = "claim"
    EXPIRE = "expire"
    PURGE = "purge"
    SWEEP = "sweep"
    SETTLE = "settle"
    FORGET = "forget"
    ERASE = "erase"


# The pause before a row is tried again. It doubles with each failure, up to an hour.
FIRST_REST_SECONDS = 60.0
LONGEST_REST_SECONDS = 3600.0
