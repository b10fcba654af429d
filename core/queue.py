"""Wake-ups: Celery messages that say "this pool has work". They name no job, and losing or repeating one is harmless.

Each pool has one queue. The producer waits at most two seconds for a broken Redis and never retries, because the next
tick of the schedule sends the wake-up again.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import redis
from celery import Celery

from core.redis_urls import read_redis_url

TASK_NAME = "espalier.serve"
_PRODUCER_TIMEOUTS: dict[str, Any] = {"socket_timeout": 2, "socket_connect_timeout": 2}


def queue_name(pool: str) -> str:
    return f"pool:{pool}"


def connect_broker(redis_url: str) -> Celery:
    """Return a Celery application on a broker. Raises ValueError for a URL that is no Redis URL."""
    address = read_redis_url(redis_url)
    celery = Celery("espalier", broker=address.url)
    if address.tls is not None:
        celery.conf.update(broker_use_ssl=dict(address.tls))
    return celery


class WakeUpPublisher:
    """Publishes a wake-up only if none waits in the pool's queue, so that a busy pool's queue does not grow."""

    def __init__(self, redis_url: str) -> None:
        self._redis = redis.Redis.from_url(**read_redis_url(redis_url).arguments, **_PRODUCER_TIMEOUTS)
        self._celery = connect_broker(redis_url)
        self._celery.conf.update(broker_transport_options=_PRODUCER_TIMEOUTS, task_ignore_result=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._celery.close()
        self._redis.close()

    def publish(self, pool: str) -> bool:
        """Wake a worker of the pool. False when a wake-up waits already. Raises the errors of redis and kombu."""
        if self._redis.llen(queue_name(pool)):
            return False
        self._celery.send_task(TASK_NAME, queue=queue_name(pool), retry=False, ignore_result=True)
        return True
