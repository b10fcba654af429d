"""`make hosts-check`: two workers on networks of their own, one of which is cut off, frozen or killed during training.

Each time the job must continue on the other worker, from its last resume point, and have one result. What the lost
worker still does must not count. Servers, images and the service are those of `make compose-check`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.deploy.compose import (
    Deployment,
    build_standins,
    count_results,
    create_tenant,
    fetch_adapter,
    prepare,
    status,
    submit_long,
    succeed,
    trained_steps,
)
from tests.deploy.engine import Engine, add_plugins
from tests.deploy.images import build_all, timed
from tests.waiting import wait_until

NETWORKS = {"worker": "espalier-check_host-a", "other-worker": "espalier-check_host-b"}


def check(engine: Engine) -> None:
    build_all(engine)
    with timed("stand-ins"):
        build_standins(engine)
    add_plugins(engine)
    deployment = prepare(engine)
    deployment.files = (*deployment.files, "deploy/compose/hosts.yml")
    try:
        with timed("up"):
            deployment.compose("up", "--detach", "--wait", "--wait-timeout", "300")
        deployment.api_key = create_tenant(deployment)
        for blow in (cut_off, frozen, killed):
            with timed(f"a worker {blow.__name__.replace('_', ' ')}"):
                lose_a_worker(deployment, blow)
    except BaseException:
        print(deployment.compose("ps", "--all"), deployment.compose("logs", "--tail", "60"), sep="\n")
        raise
    finally:
        with timed("down"):
            deployment.compose("down", "--volumes", "--timeout", "40")


def lose_a_worker(deployment: Deployment, blow: Callable[[Deployment, str], Iterator[None]]) -> None:
    job_id = submit_long(deployment)
    wait_until(lambda: trained_steps(deployment, job_id) > 0, what="a first step")
    holder = find_holder(deployment, job_id)
    other = next(name for name in NETWORKS if name != holder)
    with contextmanager(blow)(deployment, holder):
        before, since = trained_steps(deployment, job_id), time.monotonic()
        wait_until(lambda: find_holder(deployment, job_id) == other, what=f"a claim by {other}")
        claimed = time.monotonic() - since
        wait_until(lambda: trained_steps(deployment, job_id) > before, what=f"a step of {other}'s")
        print(f"{holder} lost at step {before}: claimed by {other} after {claimed:.1f} s", flush=True)
    succeed(deployment, job_id)
    fetch_adapter(deployment, job_id)
    assert count_results(deployment, job_id) == 1, "a job has one result"
    assert status(deployment, job_id) == "succeeded"


def find_holder(deployment: Deployment, job_id: str) -> str:
    """Return the worker that was the last to claim the job, by what the workers' logs say and when."""
    claims = []
    for worker in NETWORKS:
        lines = log_of(deployment, worker).splitlines()
        told = [json.loads(line) for line in lines if '"job.claimed"' in line and job_id in line]
        claims += [(line["timestamp"], worker) for line in told]
    return max(claims)[1]


def log_of(deployment: Deployment, worker: str) -> str:
    done = deployment.engine.try_docker("logs", container_of(deployment, worker))
    return done.stdout + done.stderr


def cut_off(deployment: Deployment, worker: str) -> Iterator[None]:
    """Take the worker's network away: it stops itself, and comes back as if nothing had been."""
    container = container_of(deployment, worker)
    deployment.engine.docker("network", "disconnect", "--force", NETWORKS[worker], container)
    yield
    assert "worker.self_fenced" in log_of(deployment, worker), "it trained on without a lease"
    deployment.engine.docker("network", "connect", NETWORKS[worker], container)


def frozen(deployment: Deployment, worker: str) -> Iterator[None]:
    """Stop the worker's processes in mid-step: when they go on, they believe that they still hold the job."""
    container = container_of(deployment, worker)
    deployment.engine.docker("pause", container)
    yield
    deployment.engine.docker("unpause", container)


def killed(deployment: Deployment, worker: str) -> Iterator[None]:
    deployment.compose("kill", worker)
    yield
    deployment.compose("start", worker)


def container_of(deployment: Deployment, worker: str) -> str:
    return deployment.compose("ps", "--all", "--quiet", worker).strip()
