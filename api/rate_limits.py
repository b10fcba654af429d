"""How fast a tenant may ask: requests a minute, counted in Redis by all processes together, in windows of the clock.

One round trip a request. Redis away, or slower than a tenth of a second, is nobody's fault who asks: requests pass
uncounted, one line is logged, and Redis is left alone for some seconds, so that no request waits for it.
"""

from __future__ import annotations

import math
import time
import uuid
from dataclasses import dataclass

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

log = structlog.get_logger()

WINDOW_SECONDS = 60
_TIMEOUT_SECONDS = 0.1
_REST_SECONDS = 5.0


@dataclass(frozen=True)
class Standing:
    """Where a tenant stands in its present window."""

    limit: int
    num_used: int
    seconds_left: int

    @property
    def is_exceeded(self) -> bool:
        return self.num_used > self.limit

    @property
    def headers(self) -> dict[str, str]:
        """Return the fields of draft-ietf-httpapi-ratelimit-headers."""
        left = max(0, self.limit - self.num_used)
        told = {
            "ratelimit-policy": f'"requests";q={self.limit};w={WINDOW_SECONDS}',
            "ratelimit": f'"requests";r={left};t={self.seconds_left}',
        }
        return told | {"retry-after": str(self.seconds_left)} if self.is_exceeded else told


class RateLimiter:
    """Counts requests. Shared by the threads of a process."""

    def __init__(self, redis_url: str) -> None:
        self._redis = redis.Redis.from_url(
            redis_url,
            socket_timeout=_TIMEOUT_SECONDS,
            socket_connect_timeout=_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        self._rests_until = 0.0

    def count(self, tenant_id: uuid.UUID, *, limit: int) -> Standing | None:
        """Count one request of a tenant and return where it stands, or None where nothing could be counted."""
        if time.monotonic() < self._rests_until:
            return None
        window, elapsed = divmod(time.time(), WINDOW_SECONDS)
        try:
            num_used = self._increment(f"espalier:requests:{tenant_id}:{int(window)}")
        except redis.RedisError as error:
            self._rests_until = time.monotonic() + _REST_SECONDS
            log.warning("rate_limit.not_counted", error=type(error).__name__, rest_seconds=_REST_SECONDS)
            return None
        return Standing(limit, num_used, math.ceil(WINDOW_SECONDS - elapsed))

    def _increment(self, name: str) -> int:
        with self._redis.pipeline(transaction=False) as commands:
            commands.incr(name)
            commands.expire(name, 2 * WINDOW_SECONDS)
            return int(commands.execute()[0])
