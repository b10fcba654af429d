"""The pools whose base this worker could not load, each with the reason and the time of the next try.

The waits between tries double, because a person must repair the base, which seldom takes only seconds. If the base's
row has changed since, it is tried at once. Any thread may ask, because each change replaces the whole table.
"""

from __future__ import annotations

import datetime as dt
import time
from dataclasses import dataclass

_FIRST_RETRY_SECONDS = 5.0
_LAST_RETRY_SECONDS = 300.0


@dataclass(frozen=True)
class Refusal:
    """`state_since` is that of the base's row after the refusal was recorded, or None if it was not recorded."""

    reason: str
    is_worker_fault: bool
    num_tries: int
    retry_at: float
    state_since: dt.datetime | None


class Refusals:
    def __init__(self) -> None:
        self._by_pool: dict[str, Refusal] = {}

    def add(self, pool: str, reason: str, *, is_worker_fault: bool, state_since: dt.datetime | None) -> bool:
        """Note that a pool's base was refused, and return whether the reason is a new one."""
        before = self._by_pool.get(pool)
        num_tries = before.num_tries + 1 if before else 1
        seconds = min(_FIRST_RETRY_SECONDS * 2 ** (num_tries - 1), _LAST_RETRY_SECONDS)
        refusal = Refusal(reason, is_worker_fault, num_tries, time.monotonic() + seconds, state_since)
        self._by_pool = {**self._by_pool, pool: refusal}
        return before is None or before.reason != reason

    def forget(self, pool: str) -> None:
        self._by_pool = {name: refusal for name, refusal in self._by_pool.items() if name != pool}

    def forget_base_fault(self, pool: str) -> None:
        """Forget a refusal that a look at the base's files disproves. One for what the worker itself lacks stays."""
        refusal = self._by_pool.get(pool)
        if refusal is not None and not refusal.is_worker_fault:
            self.forget(pool)

    def find(self, pool: str) -> Refusal | None:
        return self._by_pool.get(pool)

    def is_due(self, pool: str, *, state_since: dt.datetime) -> bool:
        """Say whether a pool's base may be tried now. `state_since` is that of its row."""
        refusal = self._by_pool.get(pool)
        if refusal is None or time.monotonic() >= refusal.retry_at:
            return True
        return refusal.state_since is not None and state_since > refusal.state_since

    @property
    def standing(self) -> dict[str, str]:
        """The reasons, by pool, of the bases that are not to be tried yet."""
        now = time.monotonic()
        return {pool: refusal.reason for pool, refusal in self._by_pool.items() if now < refusal.retry_at}
