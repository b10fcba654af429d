"""The faults of the soak, drawn by a seed. Each fault is over when its function returns.

Processes are children of the soak, which restarts them at once, as a supervisor would. Network faults are set for
seconds in the proxies in front of the servers.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import psycopg
import redis

from core.domain.jobs import pool_name
from core.queue import WakeUpPublisher, queue_name
from local.processes import ChildProcess, ProcessSpec
from tests.clocks import fake_clock, set_clock
from tests.e2e.lab import BASE_MODEL, Lab
from tests.faults import Answer503, Cut, CutAfter, Delay, Fault, FaultProxy, FlipByte, Hang

POOL = pool_name(BASE_MODEL, None)
LEASE_SECONDS = 4.0  # short, so that there is time for many faults and recoveries
WORKERS = ("worker-0", "worker-1")
SCHEDULES = ("schedule-0", "schedule-1")


class Fleet:
    """The service's processes, by name: two workers, two schedules, one API. What has died is started again."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._children: dict[str, ChildProcess] = {}
        self.num_restarts = 0
        for name in ("worker", "schedule", "api"):
            spec = lab.stack.process(name).spec
            lab.stack.process(name).stop()
            for own_name in {"worker": WORKERS, "schedule": SCHEDULES}.get(name, (name,)):
                own = {"ESPALIER_WORKER_NAME": own_name, "ESPALIER_MANAGEMENT_PORT": "0"}
                if name == "worker":
                    own |= fake_clock(self.clock_of(own_name), "+0")
                self._start(replace(spec, name=own_name, env={**spec.env, **own}))

    def _start(self, spec: ProcessSpec) -> None:
        self._children[spec.name] = ChildProcess(spec, self._lab.stack.data_dir / "logs")

    def clock_of(self, name: str) -> Path:
        """Return the file that says how far a worker's clock is off."""
        return self._lab.stack.data_dir / f"{name}.clock"

    def pid(self, name: str) -> int:
        return self._children[name].pid

    def trainer(self, name: str) -> psutil.Process | None:
        try:
            children = psutil.Process(self.pid(name)).children(recursive=True)
            return next((child for child in children if "worker.trainer" in child.cmdline()), None)
        except psutil.Error:
            return None

    def revive(self) -> None:
        for child in tuple(self._children.values()):
            if not child.is_alive:
                self.num_restarts += 1
                self._start(child.spec)

    def close(self) -> None:
        for child in self._children.values():
            os.kill(child.pid, signal.SIGCONT)
            child.ask_to_stop()
        for child in self._children.values():
            child.stop()


@dataclass(frozen=True)
class Kind:
    """One kind of fault. The dearer a recovery from it is, the less `weight` it has among the drawn."""

    name: str
    weight: float
    strike: Callable[[], bool]


class Nemesis:
    """Draws faults and counts those that hit. `job_ids` gives the jobs that tenants have in their hands."""

    def __init__(self, lab: Lab, fleet: Fleet, *, seed: int, job_ids: Callable[[], list[str]]) -> None:
        self._lab, self._fleet, self._job_ids = lab, fleet, job_ids
        self._random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.kinds = (*self._blows(), *self._outages(), *self._verbs())

    def strike(self) -> str:
        """Strike once, and return which kind it was."""
        (kind,) = self._random.choices(self.kinds, [kind.weight for kind in self.kinds])
        self.counts[kind.name] += kind.strike()
        return kind.name

    def _blows(self) -> tuple[Kind, ...]:
        """Signals to processes of the service."""
        return (
            Kind("kill a supervisor", 0.5, lambda: self._signal(self._one_of(WORKERS), signal.SIGKILL)),
            Kind("kill a trainer", 0.5, lambda: self._signal_trainer(signal.SIGKILL)),
            Kind("crash a trainer (SEGV)", 0.3, lambda: self._signal_trainer(signal.SIGSEGV)),
            Kind("stop a worker (TERM)", 0.5, lambda: self._signal(self._one_of(WORKERS), signal.SIGTERM)),
            Kind(
                "pause a supervisor past its lease",
                0.4,
                lambda: self._freeze(self._one_of(WORKERS), LEASE_SECONDS, LEASE_SECONDS + 1.0),
            ),
            Kind("pause a supervisor", 1.0, lambda: self._freeze(self._one_of(WORKERS), 0.3, 1.0)),
            Kind("pause a trainer", 1.0, self._freeze_trainer),
            Kind("kill a schedule", 1.0, lambda: self._signal(self._one_of(SCHEDULES), signal.SIGKILL)),
            Kind("stop a schedule (TERM)", 0.5, lambda: self._signal(self._one_of(SCHEDULES), signal.SIGTERM)),
            Kind("pause a schedule", 1.0, lambda: self._freeze(self._one_of(SCHEDULES), 0.9, 3.0)),
            Kind("kill the API", 0.6, lambda: self._signal("api", signal.SIGKILL)),
            Kind("pause the API", 1.0, lambda: self._freeze("api", 0.2, 0.7)),
        )

    def _outages(self) -> tuple[Kind, ...]:
        """What the servers, and the network before them, do."""
        servers = self._lab.servers
        proxies = {"PostgreSQL": servers.postgres, "Redis": servers.redis, "S3": servers.s3}
        shared = [
            Kind(
                f"{what} {name}",
                2.0,
                partial(self._during, proxy, fault, longest),
            )
            for name, proxy in proxies.items()
            for what, fault, longest in (("cut", Cut(), 0.6), ("hang", Hang(), 1.5), ("slow down", Delay(0.05), 1.0))
        ]
        return (
            *shared,
            Kind("S3 answers 503", 2.0, lambda: self._during(servers.s3, Answer503(), 1.5)),
            Kind("S3 flips a byte", 2.0, lambda: self._during(servers.s3, FlipByte(), 1.0)),
            Kind("PostgreSQL cut after COMMIT", 2.0, lambda: self._during(servers.postgres, CutAfter(b"COMMIT"), 0.5)),
            Kind("PostgreSQL immediate restart", 0.4, self._restart_postgres),
            Kind("PostgreSQL kills backends", 2.0, self._kill_backends),
            Kind("Redis killed, back empty", 0.7, self._lose_redis),
            Kind("Redis FLUSHALL", 2.0, self._flush_redis),
            Kind("pause Redis", 1.0, lambda: self._freeze_pid(servers.pids["redis"], 0.45, 1.5)),
            Kind("pause S3", 1.0, lambda: self._freeze_pid(servers.pids["s3"], 0.45, 1.5)),
            Kind("a wake-up twenty times", 2.0, self._wake_often),
            Kind("a worker's clock jumps", 1.0, self._move_clock),
        )

    def _verbs(self) -> tuple[Kind, ...]:
        """What tenants do at bad moments."""
        return tuple(
            Kind(f"{verb} a job", weight, partial(self._ask, verb))
            for verb, weight in (("cancel", 1.0), ("pause", 1.0), ("resume", 3.0))
        )

    def _one_of(self, names: tuple[str, ...]) -> str:
        return self._random.choice(names)

    def _signal(self, name: str, blow: signal.Signals) -> bool:
        return _send(self._fleet.pid(name), blow)

    def _signal_trainer(self, blow: signal.Signals) -> bool:
        trainer = self._fleet.trainer(self._one_of(WORKERS))
        return trainer is not None and _send(trainer.pid, blow)

    def _freeze(self, name: str, shortest: float, longest: float) -> bool:
        return self._freeze_pid(self._fleet.pid(name), shortest, longest)

    def _freeze_trainer(self) -> bool:
        trainer = self._fleet.trainer(self._one_of(WORKERS))
        return trainer is not None and self._freeze_pid(trainer.pid, 0.3, 1.0)

    def _freeze_pid(self, pid: int, shortest: float, longest: float) -> bool:
        if not _send(pid, signal.SIGSTOP):
            return False
        time.sleep(self._random.uniform(shortest, longest))
        return _send(pid, signal.SIGCONT)

    def _move_clock(self) -> bool:
        clock = self._fleet.clock_of(self._one_of(WORKERS))
        set_clock(clock, self._random.choice(("-1h", "-20m", "-10s", "+10s", "+20m", "+1h")))
        time.sleep(self._random.uniform(0.3, 2.0))
        set_clock(clock, "+0")
        return True

    def _during(self, proxy: FaultProxy, fault: Fault, longest: float) -> bool:
        num_hits = proxy.num_hits
        with proxy.during(fault):
            time.sleep(longest * self._random.uniform(0.3, 1.0))
        return proxy.num_hits > num_hits

    def _restart_postgres(self) -> bool:
        self._lab.servers.restart("postgres", blow=signal.SIGQUIT)
        return True

    def _kill_backends(self) -> bool:
        query = "select count(pg_terminate_backend(pid)) from pg_stat_activity where usename like 'espalier%' and random() < 0.7"
        try:
            with psycopg.connect(self._lab.servers.direct.postgres_url, autocommit=True) as connection:
                found = connection.execute(query).fetchone()
        except psycopg.OperationalError:  # it is on its way back from another fault
            return False
        return found is not None and found[0] > 0

    def _lose_redis(self) -> bool:
        self._lab.servers.restart("redis", blow=signal.SIGKILL, lost=("appendonlydir",))
        return True

    def _flush_redis(self) -> bool:
        return self._with_redis(lambda client: client.flushall())

    def _wake_often(self) -> bool:
        def wake(client: redis.Redis) -> None:
            with WakeUpPublisher(self._lab.servers.direct.redis_url) as publisher:
                publisher.publish(POOL)
            if message := client.lindex(queue_name(POOL), 0):
                client.rpush(queue_name(POOL), *[message] * 19)

        return self._with_redis(wake)

    def _with_redis(self, act: Callable[[redis.Redis], object]) -> bool:
        try:
            with redis.Redis.from_url(self._lab.servers.direct.redis_url, socket_timeout=2) as client:
                act(client)
        except redis.RedisError:  # it is on its way back from another fault
            return False
        return True

    def _ask(self, verb: str) -> bool:
        job_ids = self._job_ids()
        return bool(job_ids) and self._lab.post(self._random.choice(job_ids), verb).is_success


def _send(pid: int, blow: signal.Signals) -> bool:
    try:
        os.kill(pid, blow)
    except ProcessLookupError:
        return False
    return True
