"""How many requests a tenant may send a minute. All processes count together in Redis, in minutes of the clock.

A request costs one round trip at most. While a tenant is far from its limit, a process counts some requests in advance
and passes them without asking Redis. Requests that were counted and not used still count, so the limit is never passed.
Each process wastes at most a thousandth of the limit.

If Redis is away, or slower than a tenth of a second, requests pass uncounted. One line is logged, and Redis is not
asked for some seconds, so that no request waits for it.
"""

from __future__ import annotations

import datetime as dt
import math
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from core.redis_urls import read_redis_url

log = structlog.get_logger()

WINDOW_SECONDS = 60
_TIMEOUT_SECONDS = 0.1
_REST_SECONDS = 5.0
_MAX_ADVANCE = 64
_MAX_TENANTS = 10_000
_ADVANCE_SHARE = 1000  # at most 1/1000 of what is left is counted in advance


@dataclass(frozen=True)
class Standing:
    """How much of its limit a tenant has used in the current window."""

    limit: int
    num_used: int
    seconds_left: int

    @property
    def is_exceeded(self) -> bool:
        return self.num_used > self.limit

    @property
    def headers(self) -> dict[str, str]:
        """Return the header fields of draft-ietf-httpapi-ratelimit-headers."""
        left = max(0, self.limit - self.num_used)
        told = {
            "ratelimit-policy": f'"requests";q={self.limit};w={WINDOW_SECONDS}',
            "ratelimit": f'"requests";r={left};t={self.seconds_left}',
        }
        return told | {"retry-after": str(self.seconds_left)} if self.is_exceeded else told


@dataclass
class _Advance:
    """Requests of one window that were counted in Redis and not yet made. `num_counted` is what Redis answered last."""

    window: int
    num_counted: int
    num_left: int


class RateLimiter:
    """Counts requests. The threads of a process share it."""

    def __init__(self, redis_url: str, *, now: Callable[[], dt.datetime]) -> None:
        """`now` is the time by which all processes cut the same windows."""
        self._now = now
        self._redis = redis.Redis.from_url(
            **read_redis_url(redis_url).arguments,
            socket_timeout=_TIMEOUT_SECONDS,
            socket_connect_timeout=_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        self._rests_until = 0.0
        self._lock = threading.Lock()
        self._advances: dict[uuid.UUID, _Advance] = {}

    @property
    def is_resting(self) -> bool:
        """Return whether Redis is not asked now, so that nothing is counted."""
        return time.monotonic() < self._rests_until

    def draw(self, tenant_id: uuid.UUID, *, limit: int) -> Standing | None:
        """Take a request that was counted in advance and return the tenant's standing, or None. Never blocks."""
        window, elapsed = divmod(self._now().timestamp(), WINDOW_SECONDS)
        with self._lock:
            advance = self._advances.get(tenant_id)
            if advance is None or advance.window != window or not advance.num_left:
                return None
            advance.num_left -= 1
            num_used = advance.num_counted - advance.num_left
        return Standing(limit, num_used, math.ceil(WINDOW_SECONDS - elapsed))

    def count(self, tenant_id: uuid.UUID, *, limit: int) -> Standing | None:
        """Count one request of a tenant. Return the tenant's standing, or None if nothing could be counted."""
        if self.is_resting:
            return None
        window, elapsed = divmod(self._now().timestamp(), WINDOW_SECONDS)
        size = self._choose_size(tenant_id, int(window), limit)
        try:
            num_counted = self._increment(f"espalier:requests:{tenant_id}:{int(window)}", size)
        except redis.RedisError as error:
            self._rests_until = time.monotonic() + _REST_SECONDS
            log.warning("rate_limit.not_counted", error=type(error).__name__, rest_seconds=_REST_SECONDS)
            return None
        num_granted = max(0, min(size, limit - (num_counted - size)))
        self._keep(tenant_id, _Advance(int(window), num_counted, max(0, num_granted - 1)))
        return Standing(limit, num_counted - size + 1, math.ceil(WINDOW_SECONDS - elapsed))

    def _choose_size(self, tenant_id: uuid.UUID, window: int, limit: int) -> int:
        """Return how many requests to count at once: one, unless very many are known to be left."""
        known = self._advances.get(tenant_id)
        if known is None or known.window != window:
            return 1
        return max(1, min(_MAX_ADVANCE, (limit - known.num_counted) // _ADVANCE_SHARE))

    def _keep(self, tenant_id: uuid.UUID, advance: _Advance) -> None:
        with self._lock:
            known = self._advances.get(tenant_id)
            if known and known.window == advance.window:
                advance.num_left += known.num_left  # another thread has counted too
                advance.num_counted = max(advance.num_counted, known.num_counted)
            elif len(self._advances) >= _MAX_TENANTS:
                self._advances.clear()
            self._advances[tenant_id] = advance

    def _increment(self, name: str, size: int) -> int:
        with self._redis.pipeline(transaction=False) as commands:
            commands.incrby(name, size)
            commands.expire(name, 2 * WINDOW_SECONDS)
            return int(commands.execute()[0])
