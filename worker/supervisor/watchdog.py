"""Checks, on its own thread, whether wake-ups still reach this worker.

| what is wrong | what this worker does |
|---|---|
| Redis is away | it claims by itself what may be claimed |
| wake-ups wait in Redis, and the consumer does not take them | it ends, holding no job, and is started again |

The second happens when an acknowledgement has timed out: the consumer then takes nothing for ever, but answers every
ping. One look proves nothing: a wake-up may have come just now, and the consumer of a worker that starts is not there
yet. Whether the serving loop still turns is part of the process's liveness, which never asks the consumer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import redis
import structlog

from core.db.session import DATABASE_ERRORS
from core.queue import queue_name
from core.redis_urls import read_redis_url
from core.settings import WorkerSettings
from core.telemetry.liveness import PROCESS, Liveness
from worker.supervisor.runner import Runner

log = structlog.get_logger()
_LOOKS_PER_DEAF_TIME = 6
_REDIS_TIMEOUT_SECONDS = 2.0
_DEAF_EXIT_CODE = 1
_PATIENCE_SECONDS = 60.0


class Watchdog:
    """Looks several times within `deaf_seconds`. `end_process` is called with the exit code of a deaf worker.

    A worker is deaf if it was idle for `deaf_seconds` and then let wake-ups wait at every look for as long again.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        runner: Runner,
        *,
        end_process: Callable[[int], None] = os._exit,
        liveness: Liveness = PROCESS,
    ) -> None:
        self._settings = settings
        self._liveness = liveness
        self._runner = runner
        self._end_process = end_process
        self._redis = redis.Redis.from_url(
            **read_redis_url(settings.redis_url.get_secret_value()).arguments,
            socket_timeout=_REDIS_TIMEOUT_SECONDS,
            socket_connect_timeout=_REDIS_TIMEOUT_SECONDS,
            retry=None,
        )
        self._unheard_since: float | None = None
        patience_seconds = settings.deaf_seconds + _PATIENCE_SECONDS
        self._life = liveness.add_duty("heeding silence", patience_seconds=patience_seconds)

    def start(self) -> None:
        self._liveness.add_check("the loop that serves", self._find_stall)
        self._liveness.start_thread(self._look_forever, name="watchdog")

    def heed_silence(self) -> None:
        """Serve, or end the process, if no wake-up has come for long although there is work."""
        if not self._is_left_asleep():
            self._unheard_since = None
        elif not self._is_wake_up_waiting():
            self._unheard_since = None
            log.warning("worker.claims_unwoken")
            self._life.rest()  # it may serve for hours; liveness watches whether the loop turns
            self._runner.serve()
        elif self._unheard_since is None:
            self._unheard_since = time.monotonic()
        elif time.monotonic() - self._unheard_since >= self._settings.deaf_seconds:
            log.error("worker.deaf")
            self._end_process(_DEAF_EXIT_CODE)

    def _find_stall(self) -> str | None:
        return None if self._runner.is_turning else "the loop that serves jobs does not turn"

    def _look_forever(self) -> None:
        while True:
            self._life.beat()
            self.heed_silence()
            time.sleep(self._settings.deaf_seconds / _LOOKS_PER_DEAF_TIME)

    def _is_left_asleep(self) -> bool:
        """Say whether this worker has been idle for long although there is work. False if the database is away."""
        if self._runner.idle_seconds < self._settings.deaf_seconds:
            return False
        try:
            return self._runner.has_claimable_work()
        except DATABASE_ERRORS:
            return False

    def _is_wake_up_waiting(self) -> bool:
        try:
            return any(self._redis.llen(queue_name(pool)) for pool in self._settings.worker_pools)
        except redis.RedisError:
            return False
