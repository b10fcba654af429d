"""Records when each attempt left the device: its trainer has reported it, or the trainer itself is gone.

From its claim on, an attempt may be on the device. Its leaving is recorded once, with the time at which it left,
however long the database was away.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Engine

from core.db.session import service_transaction
from core.domain.leases import Lease
from core.services import attempts


@dataclass(frozen=True)
class _Departure:
    lease: Lease
    left_at: float


class Departures:
    """The attempts that may be on the device, by lease token, and those whose leaving is not recorded yet."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._expected: dict[int, Lease] = {}
        self._unrecorded: list[_Departure] = []

    @property
    def are_due(self) -> bool:
        return bool(self._expected or self._unrecorded)

    def expect(self, lease: Lease) -> None:
        self._expected[lease.token] = lease

    def note(self, lease_token: int) -> None:
        """Note that an attempt has left the device now."""
        lease = self._expected.pop(lease_token, None)
        if lease is not None:
            self._unrecorded.append(_Departure(lease, time.monotonic()))

    def note_all(self) -> None:
        """Note that no attempt is on the device, because the trainer is gone."""
        for lease_token in tuple(self._expected):
            self.note(lease_token)

    def record(self) -> None:
        """Record what was noted. Raises the database's errors; what was noted is then kept."""
        if not self._unrecorded:
            return
        with service_transaction(self._engine) as session:
            for each in self._unrecorded:
                attempts.record_departure(session, each.lease, seconds_ago=time.monotonic() - each.left_at)
        self._unrecorded.clear()
