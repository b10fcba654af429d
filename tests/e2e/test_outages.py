"""Redis, PostgreSQL and the API fail around a submission: accepted jobs run, once, and soon. Rows of docs/contract.md."""

from __future__ import annotations

import datetime as dt
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx
import psycopg
import pytest
import redis
from openai import OpenAI

from core.domain.jobs import pool_name
from core.queue import queue_name
from local.ports import free_ports
from local.processes import ChildProcess
from local.stack import answers
from tests.e2e.lab import BASE_MODEL, ENDED, LEASE_SECONDS, Lab
from tests.faults import Cut, CutAfter, Fault, FaultProxy, Hang, port_of, with_port
from tests.waiting import PATIENCE_SECONDS, wait_until

QUEUE = queue_name(pool_name(BASE_MODEL, None))
NEVER_DEAF = {"ESPALIER_DEAF_SECONDS": "3600"}  # a worker that starts nothing but what it is woken for
# Half the time for which an API leaves alone a Redis that did not answer: its log may lag behind on a busy machine.
REST = dt.timedelta(seconds=2.5)


@contextmanager
def redis_client(lab: Lab) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(lab.servers.direct.redis_url, socket_timeout=PATIENCE_SECONDS) as client:
        yield client


def body_of_a_job(lab: Lab, *, api_key: str | None = None) -> dict[str, object]:
    client = lab.client.with_options(api_key=api_key) if api_key else lab.client
    line = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    file = client.files.create(file=("rows.jsonl", line), purpose="fine-tune")
    return {"model": BASE_MODEL, "training_file": file.id, "hyperparameters": {"n_epochs": 1, "batch_size": 1}}


def post_job(
    lab: Lab, body: dict[str, object], *, url: str | None = None, key: str | None = None, api_key: str | None = None
) -> httpx.Response:
    headers = {"authorization": f"Bearer {api_key or lab.api_key}"} | ({"idempotency-key": key} if key else {})
    place = f"{url or lab.stack.api_url}/v1/fine_tuning/jobs"
    return httpx.post(place, json=body, headers=headers, timeout=PATIENCE_SECONDS, trust_env=False)


@pytest.mark.fault(7)
def test_row_7_redis_emptied_again_and_again_delays_no_job_by_more_than_five_seconds(lab: Lab) -> None:
    lab.ensure_worker()
    job_ids = [lab.submit(n_epochs=1) for _ in range(6)]
    with redis_client(lab) as client:

        def all_have_ended() -> bool:
            client.flushall()
            return all(lab.job(job_id).status in ENDED for job_id in job_ids)

        wait_until(all_have_ended)
        for job_id in job_ids:
            lab.succeed(job_id)
        lab.kill_workers()
        waiting = lab.submit(n_epochs=1)
        wait_until(lambda: client.llen(QUEUE) == 1, what="a wake-up")
        client.flushall()
        wait_until(lambda: client.llen(QUEUE) == 1, what="the wake-up of the next tick")
    lab.ensure_worker()
    lab.succeed(waiting)


@pytest.mark.fault(8)
def test_row_8_redis_killed_and_back_empty_disturbs_no_running_job_and_the_next_starts_within_ten_seconds(
    lab: Lab,
) -> None:
    lab.kill_workers()
    lab.start_worker(**NEVER_DEAF)
    busy = lab.submit(n_epochs=30)
    lab.rows.wait_for_step(busy, 3)
    lab.servers.restart("redis", blow=signal.SIGKILL, lost=("appendonlydir",))
    following = lab.submit(n_epochs=1)
    lab.succeed(following)
    lab.succeed(busy)
    assert lab.rows.outcomes(busy) == ["succeeded"]
    lab.servers.restart("redis", blow=signal.SIGKILL, lost=("appendonlydir",))  # while the worker has nothing to do
    last = lab.submit(n_epochs=1)
    lab.succeed(last)


@pytest.mark.fault(9)
def test_row_9_a_job_is_accepted_while_redis_is_down_and_starts_when_it_is_back(lab: Lab) -> None:
    lab.ensure_worker()
    with lab.servers.redis.during(Cut()):
        job_id = lab.submit(n_epochs=1)
        assert lab.job(job_id).status in ("queued", "running")
    lab.succeed(job_id)


def start_api(lab: Lab, log_dir: Path, **env: str) -> tuple[ChildProcess, str]:
    """Start another API of the lab's, and return it with its URL."""
    spec, (port,) = lab.stack.process("api").spec, free_ports(1)
    own = {"ESPALIER_API_PORT": str(port), "ESPALIER_MANAGEMENT_PORT": "0"}
    spec = replace(spec, name="another-api", env={**spec.env, **own, **env})
    api, url = ChildProcess(spec, log_dir), f"http://127.0.0.1:{port}"
    api.wait_until(lambda: answers(url), timeout_seconds=PATIENCE_SECONDS)
    return api, url


@pytest.mark.fault(10)
def test_row_10_a_submission_takes_no_longer_while_redis_hangs(lab: Lab, tmp_path: Path) -> None:
    lab.kill_workers()
    api_key = lab.stack.create_tenant("row-10")
    # So low a limit that every request is counted in Redis, none in advance; such a tenant is in no process's memory.
    lab.rows.sql("update tenants set requests_per_minute = 600 where slug = %s returning 1", "row-10")
    body = body_of_a_job(lab, api_key=api_key)
    with FaultProxy(port_of(lab.servers.direct.redis_url)) as proxy:  # this API's own, so that it counts nobody else's
        api, url = start_api(lab, tmp_path, ESPALIER_REDIS_URL=with_port(lab.servers.direct.redis_url, proxy.port))
        with OpenAI(base_url=f"{url}/v1", api_key=api_key) as client:
            list_jobs = client.fine_tuning.jobs.with_raw_response.list
            wait_until(lambda: "ratelimit-policy" in list_jobs().headers, what="a request that is counted")
            num_rests = len(lab.told_by(api, "rate_limit.not_counted"))
            with proxy.during(Hang()):
                assert all(post_job(lab, body, url=url, api_key=api_key).is_success for _ in range(50))
            for job in client.fine_tuning.jobs.list(limit=50):
                client.fine_tuning.jobs.cancel(job.id)
        api.stop()
    begun = [dt.datetime.fromisoformat(line["timestamp"]) for line in lab.told_by(api, "rate_limit.not_counted")]
    assert proxy.num_hits == len(begun) - num_rests, "nobody waits for Redis but for its count"
    assert all(later - earlier >= REST for earlier, later in pairwise(begun)), "one of an interval of rest, at most"


@pytest.mark.fault(12)
def test_row_12_a_redis_that_is_full_stops_no_schedule_and_wake_ups_go_on_when_there_is_room(lab: Lab) -> None:
    lab.kill_workers()
    schedule = lab.stack.process("schedule")
    with redis_client(lab) as client:
        client.flushall()
        client.config_set("maxmemory", 1)
        try:
            num_told = schedule.log_path.read_text().count("broker.unavailable")
            job_id = lab.submit(n_epochs=1)
            wait_until(lambda: schedule.log_path.read_text().count("broker.unavailable") > num_told, what="a warning")
        finally:
            client.config_set("maxmemory", 0)
        wait_until(lambda: client.llen(QUEUE) == 1, what="a wake-up")
    assert schedule.is_alive
    lab.ensure_worker()
    lab.succeed(job_id)


@pytest.mark.fault(15)
def test_row_15_a_commit_whose_answer_is_lost_and_the_clients_retry_are_one_job(lab: Lab) -> None:
    body, key = body_of_a_job(lab), uuid.uuid4().hex
    lab.servers.postgres.inject(Cut())  # so that statements are sent in words again, not by their names
    lab.servers.postgres.inject(Fault())
    wait_until(lambda: answers(lab.stack.api_url), what="the API")
    with lab.servers.postgres.during(CutAfter(b"COMMIT", once_sent=b"INSERT INTO jobs")):
        assert post_job(lab, body, key=key).status_code == 503
        assert lab.servers.postgres.num_hits
    again = [post_job(lab, body, key=key) for _ in range(2)]
    assert [answer.status_code for answer in again] == [200, 200]
    assert len({answer.json()["id"] for answer in again}) == 1
    query = "select count(*) from jobs where training_file_id = (select training_file_id from jobs where id = %s)"
    assert lab.rows.sql(query, again[0].json()["id"]) == [(1,)]
    lab.post(again[0].json()["id"], "cancel")


@pytest.mark.fault(16)
def test_row_16_a_deadlock_is_retried_and_its_client_never_hears_of_it(lab: Lab) -> None:
    log_path = lab.servers.data_dir / "logs" / "postgres.log"
    num_deadlocks = log_path.read_text().count("deadlock detected")
    with lab.rows.claims_held(), psycopg.connect(lab.servers.direct.postgres_url) as ours:
        job_id = lab.submit(n_epochs=1)
        row_id = job_id.removeprefix("ftjob-")
        ours.execute("set deadlock_timeout = '1min'")  # so that the victim is the API
        ours.execute("select from queues for update")
        answers_seen: list[tuple[int, str | None]] = []
        tap = httpx.Client(
            event_hooks={"response": [lambda it: answers_seen.append((it.status_code, it.headers.get("retry-after")))]},
            timeout=PATIENCE_SECONDS,
        )
        with tap, ThreadPoolExecutor(1) as pool:
            client = lab.client.with_options(max_retries=3, http_client=tap)  # type: ignore[arg-type]  # openai also takes a client of httpx
            cancelled = pool.submit(client.fine_tuning.jobs.cancel, job_id)
            wait_until(lambda: is_locked(lab, row_id), what="the API's lock on the job")
            ours.execute("select from jobs where id = %s for update", (row_id,))  # returns when the API was the victim
            ours.commit()
            assert cancelled.result().status == "cancelled"
    wait_until(lambda: log_path.read_text().count("deadlock detected") > num_deadlocks, what="the line in the log")
    assert answers_seen == [(200, None)]


def is_locked(lab: Lab, row_id: str) -> bool:
    with psycopg.connect(lab.servers.direct.postgres_url) as connection:
        query = "select from jobs where id = %s for update skip locked"
        return connection.execute(query, (row_id,)).fetchone() is None


@pytest.mark.fault(24)
def test_row_24_a_job_whose_api_died_before_it_could_answer_runs_within_five_seconds(lab: Lab, tmp_path: Path) -> None:
    lab.kill_workers()
    lab.start_worker(**NEVER_DEAF)
    lab.succeed(lab.submit(n_epochs=1))  # the base is loaded from here on
    body = body_of_a_job(lab)
    api, url = start_api(lab, tmp_path, CRASHPOINT="post_insert:1")
    with pytest.raises(httpx.TransportError):
        post_job(lab, body, url=url)
    file_id = str(body["training_file"]).removeprefix("file-")
    query = "select id::text, status from jobs where training_file_id = %s"
    ((job_id, _),) = lab.rows.sql(query, file_id)
    wait_until(lambda: lab.rows.sql(query, file_id)[0][1] != "queued", what="a claim")
    assert not api.is_alive
    lab.succeed(f"ftjob-{uuid.UUID(job_id).hex}")


@pytest.mark.fault(54)
def test_row_54_a_worker_that_dies_right_after_its_claim_costs_one_lease(lab: Lab) -> None:
    lab.kill_workers()
    doomed = lab.start_worker(CRASHPOINT="post_claim:1")
    job_id = lab.submit(n_epochs=1)
    wait_until(lambda: not doomed.is_alive, what="the crash")
    held_until = lab.rows.lease_end(job_id)
    ((claimed_at,),) = lab.rows.sql("select started_at from attempts where job_id = %s", job_id)
    assert (held_until - claimed_at).total_seconds() == LEASE_SECONDS, "one lease"
    wait_until(lambda: lab.rows.outcomes(job_id) == ["lost"], what="expiry")
    assert lab.rows.attempt_end(job_id) >= held_until
    lab.ensure_worker()
    lab.succeed(job_id)
    assert lab.rows.outcomes(job_id) == ["lost", "succeeded"]
