"""The leases a supervisor holds: prolonged while its trainer lives, given up when the database cannot be reached.

Deadlines are the database's clock. This process measures only how long ago its last good heartbeat was, by its
monotonic clock, so as to stop itself before somebody else may start the same job.
"""

from __future__ import annotations

import time

from sqlalchemy import Engine

from core.db.session import service_transaction
from core.services.attempts import Lease, StaleLeaseError, heartbeat

_SELF_FENCE_FRACTION = 2 / 3


class LeaseKeeper:
    """Prolongs leases at intervals and says which were lost."""

    def __init__(self, engine: Engine, *, lease_seconds: float, heartbeat_seconds: float) -> None:
        self._engine = engine
        self._lease_seconds = lease_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._beat_at = time.monotonic()

    def reset(self) -> None:
        """Start the clock anew: a lease was just claimed while none was held."""
        self._beat_at = time.monotonic()

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._beat_at >= self._heartbeat_seconds

    @property
    def must_stop(self) -> bool:
        """True when the leases may soon be another worker's."""
        return time.monotonic() - self._beat_at > self._lease_seconds * _SELF_FENCE_FRACTION

    def beat(self, leases: tuple[Lease, ...]) -> tuple[Lease, ...]:
        """Prolong every lease and return those that are not held any more. Raises the database's errors."""
        started = time.monotonic()
        lost = tuple(lease for lease in leases if not self._prolong(lease))
        self._beat_at = started
        return lost

    def _prolong(self, lease: Lease) -> bool:
        try:
            with service_transaction(self._engine) as session:
                heartbeat(session, lease, lease_seconds=self._lease_seconds)
        except StaleLeaseError:
            return False
        return True
