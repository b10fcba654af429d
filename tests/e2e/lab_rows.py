"""The rows of a lab: read, waited for and changed over a connection that outlives restarts of the server."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from tests.faults import FaultyServers
from tests.waiting import wait_until


class LabRows:
    """What the database says of jobs, by their public ids, and of workers. It costs less than to ask over the wire."""

    def __init__(self, servers: FaultyServers) -> None:
        self._servers = servers  # which PostgreSQL is theirs changes with a failover
        self._connection = self._connect()

    def close(self) -> None:
        self._connection.close()

    def sql(self, query: str, job_id: str) -> list[Any]:
        values = (job_id.removeprefix("ftjob-"),)
        try:
            return self._connection.execute(query, values).fetchall()
        except psycopg.OperationalError:  # the server was restarted since, and may be on its way back
            wait_until(self._has_reconnected, what="the database")
            return self._connection.execute(query, values).fetchall()

    def _has_reconnected(self) -> bool:
        try:
            self._connection = self._connect()
        except psycopg.OperationalError:
            return False
        return True

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(self._servers.direct.postgres_url, autocommit=True)

    def has_worker(self, given_name: str) -> bool:
        row = self._connection.execute("select from workers where given_name = %s", (given_name,)).fetchone()
        return row is not None

    @contextmanager
    def claims_held(self) -> Iterator[None]:
        """Let nobody claim a job of the tenant within this block, by its quota."""
        self._connection.execute("update tenants set max_running = 0")
        try:
            yield
        finally:
            self._connection.execute("update tenants set max_running = default")

    def messages(self, job_id: str) -> list[str]:
        return [
            message for (message,) in self.sql("select message from events where job_id = %s order by number", job_id)
        ]

    def has_said(self, job_id: str, start: str) -> bool:
        return any(message.startswith(start) for message in self.messages(job_id))

    def wait_for_step(self, job_id: str, step: int) -> None:
        wait_until(
            lambda: self.sql("select trained_steps from jobs where id = %s", job_id)[0][0] >= step, what=f"step {step}"
        )

    def wait_for_resume_point(self, job_id: str) -> int:
        query = "select max(step) from resume_points where job_id = %s"
        wait_until(lambda: self.sql(query, job_id)[0][0] is not None, what="a resume point")
        return int(self.sql(query, job_id)[0][0])

    def outcomes(self, job_id: str) -> list[str]:
        return [
            row[0] for row in self.sql("select outcome from attempts where job_id = %s order by lease_token", job_id)
        ]

    def seconds_until_device_was_free(self, job_id: str) -> float:
        """Wait until a cancelled job's trainer has reported that it left, and return how long after its end it did."""
        query = "select extract(epoch from left_device_at - ended_at) from attempts where job_id = %s"
        wait_until(lambda: self.sql(query, job_id)[0][0] is not None, what="a free device")
        return float(self.sql(query, job_id)[0][0])

    def lease_end(self, job_id: str) -> dt.datetime:
        """Return when the job's lease is over, by the database's clock."""
        ((lease_until,),) = self.sql("select lease_until from jobs where id = %s", job_id)
        assert lease_until is not None, "nobody holds the job"
        return lease_until  # type: ignore[no-any-return]

    def wait_for_instant(self, instant: dt.datetime) -> None:
        """Wait until it is over, by the clock that decides about leases."""
        now = "select clock_timestamp() from jobs limit 1"
        wait_until(lambda: self._connection.execute(now).fetchone()[0] > instant, what=str(instant))  # type: ignore[index]

    def attempt_end(self, job_id: str) -> dt.datetime:
        """Return when the job's first attempt ended, by the database's clock."""
        query = "select ended_at from attempts where job_id = %s order by lease_token limit 1"
        return self.sql(query, job_id)[0][0]  # type: ignore[no-any-return]

    def attempt_count(self, job_id: str) -> int:
        return int(self.sql("select attempt_count from jobs where id = %s", job_id)[0][0])

    def limit_attempts(self, job_id: str, number: int) -> None:
        self.sql(f"update jobs set max_attempts = {number} where id = %s returning 1", job_id)

    def metric_steps(self, job_id: str) -> list[int]:
        return [row[0] for row in self.sql("select step from metrics where job_id = %s order by step", job_id)]
