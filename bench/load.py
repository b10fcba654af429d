"""The load that locust puts on the control plane for bench/control_plane.py, one class for each kind of request.

`TARGETS` has one [API key, file id, job id] for each simulated tenant. `RATE` is the requests a second of all users
together; 0 means as many as possible.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from typing import Any

from locust import FastHttpUser, constant_throughput, task

from bench.bare import BASE_ID

TARGETS = itertools.cycle(json.loads(os.environ.get("TARGETS", "[]")))
RATE, NUM_USERS = float(os.environ.get("RATE", "0")), int(os.environ.get("NUM_USERS", "1"))
PACE: Callable[[Any], float] = constant_throughput(RATE / NUM_USERS) if RATE else lambda _user: 0.0


class _User(FastHttpUser):
    abstract = True
    wait_time = PACE

    def on_start(self) -> None:
        api_key, self.file_id, self.job_id = next(TARGETS)
        self.headers = {"authorization": f"Bearer {api_key}"}


class Submitter(_User):
    @task
    def submit(self) -> None:
        body = {"model": BASE_ID, "training_file": self.file_id}
        self.client.post("/v1/fine_tuning/jobs", json=body, headers=self.headers, name="submit")


class Follower(_User):
    @task
    def look(self) -> None:
        self.client.get(f"/v1/fine_tuning/jobs/{self.job_id}", headers=self.headers, name="status")


class Bare(FastHttpUser):
    wait_time = PACE

    @task
    def look(self) -> None:
        self.client.get("/bare", name="bare")
