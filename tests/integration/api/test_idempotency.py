"""One job for one submission: idempotency keys, and the retries that OpenAI's client makes by itself."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import openai
import pytest
from openai import OpenAI
from sqlalchemy import Engine, func, select, text

from core.db.models import IdempotencyKey, Job
from core.db.session import connect, service_transaction, tenant_transaction
from core.domain.ids import IdKind, parse_id
from core.domain.job_requests import JobRequest
from core.services.idempotency import Submission, forget_expired_keys, submit_once
from tests.databases import Database
from tests.factories.bases import BASE_MODEL
from tests.factories.files import GOOD, upload
from tests.factories.jobs import submit
from tests.factories.tenants import Tenant
from tests.waiting import PATIENCE_SECONDS, wait_until


def num_jobs(owner: Engine, tenant: Tenant) -> int:
    with service_transaction(owner) as session:
        return session.scalars(select(func.count()).where(Job.tenant_id == tenant.id)).one()


def with_key(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


def retry(number: int) -> dict[str, str]:
    return {"x-stainless-retry-count": str(number)}


def test_the_same_key_and_the_same_body_are_one_job(client: OpenAI, owner: Engine, tenant: Tenant) -> None:
    file = upload(client, GOOD)
    first = submit(client, file.id, suffix="a", extra_headers=with_key("k1"))
    again = submit(client, file.id, suffix="a", seed=None, extra_headers=with_key("k1"))
    assert (again.id, again.seed) == (first.id, first.seed)
    assert submit(client, file.id, suffix="a", extra_headers=with_key("k2")).id != first.id
    assert num_jobs(owner, tenant) == 2


def test_a_replayed_answer_says_so(client: OpenAI) -> None:
    file = upload(client, GOOD)
    create = client.fine_tuning.jobs.with_raw_response.create
    answers = [
        create(model="acme-labs/tiny-base", training_file=file.id, extra_headers=with_key("once")) for _ in range(2)
    ]
    assert [answer.headers.get("idempotent-replayed") for answer in answers] == [None, "true"]


def test_the_same_key_for_another_body_is_unprocessable(client: OpenAI, owner: Engine, tenant: Tenant) -> None:
    file = upload(client, GOOD)
    submit(client, file.id, extra_headers=with_key("k"))
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        submit(client, file.id, seed=7, extra_headers=with_key("k"))
    assert refused.value.code == "idempotency_key_reused"
    assert num_jobs(owner, tenant) == 1


@pytest.mark.fault(45)
def test_fifty_requests_at_once_with_one_key_are_one_job(client: OpenAI, owner: Engine, tenant: Tenant) -> None:
    file = upload(client, GOOD)
    with ThreadPoolExecutor(50) as pool:
        made = list(pool.map(lambda _: submit(client, file.id, extra_headers=with_key("burst")).id, range(50)))
    assert len(set(made)) == 1
    assert num_jobs(owner, tenant) == 1


def test_a_refused_submission_does_not_use_up_its_key(client: OpenAI) -> None:
    file = upload(client, GOOD)
    with pytest.raises(openai.BadRequestError):
        submit(client, file.id, extra_body={"max_seq_len": 512}, extra_headers=with_key("mended"))
    assert submit(client, file.id, extra_headers=with_key("mended")).status == "queued"


def test_a_key_of_another_tenant_is_another_key(client: OpenAI, other_client: OpenAI) -> None:
    jobs = {submit(each, upload(each, GOOD).id, extra_headers=with_key("shared")).id for each in (client, other_client)}
    assert len(jobs) == 2


def test_a_key_is_forgotten_after_a_day(client: OpenAI, owner: Engine, tenant: Tenant, database: Database) -> None:
    file = upload(client, GOOD)
    first = submit(client, file.id, extra_headers=with_key("daily"))
    age_keys(owner, tenant)
    second = submit(client, file.id, seed=1, extra_headers=with_key("daily"))
    assert second.id != first.id
    age_keys(owner, tenant)
    schedule = connect(database.schedule_url)
    with service_transaction(schedule) as session:
        forget_expired_keys(session)
        assert session.scalars(select(func.count()).where(IdempotencyKey.tenant_id == tenant.id)).one() == 0
    schedule.dispose()


def age_keys(owner: Engine, tenant: Tenant) -> None:
    with tenant_transaction(owner, tenant.id) as session:
        session.execute(text("update idempotency_keys set created_at = created_at - interval '24 hours 1 second'"))


@pytest.mark.parametrize("key", ["k" * 256, "a b", "\x7f"])
def test_a_malformed_key_is_refused(client: OpenAI, key: str) -> None:
    with pytest.raises(openai.BadRequestError):
        submit(client, "file-" + "0" * 32, extra_headers=with_key(key))


def test_a_retry_of_the_client_finds_the_job_that_its_first_try_made(
    client: OpenAI, owner: Engine, tenant: Tenant
) -> None:
    file = upload(client, GOOD)
    first = submit(client, file.id)
    assert submit(client, file.id, extra_headers=retry(1)).id == first.id
    assert submit(client, file.id, extra_headers=retry(2)).id == first.id
    assert submit(client, file.id, seed=3, extra_headers=retry(1)).id != first.id
    assert submit(client, file.id).id != first.id  # asked for twice on purpose
    assert num_jobs(owner, tenant) == 3


def test_a_retry_that_comes_later_than_the_window_is_a_new_job(client: OpenAI, owner: Engine, tenant: Tenant) -> None:
    file = upload(client, GOOD)
    first = submit(client, file.id)
    with service_transaction(owner) as session:
        older = text("update jobs set created_at = created_at - interval '121 s' where tenant_id = :tenant")
        session.execute(older, {"tenant": tenant.id})
    assert submit(client, file.id, extra_headers=retry(1)).id != first.id
    assert num_jobs(owner, tenant) == 2


def receive_json(source: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n{" not in received or not received.endswith(b"}"):
        received += source.recv(2**16)
    return received


@contextmanager
def answers_lost(api_url: str, *, num_lost: int) -> Iterator[str]:
    """Stand before the API, pass every request on, and hang up instead of passing on the first answers."""
    target = urlsplit(api_url)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for number in range(num_lost + 1):
            connection, _ = listener.accept()
            with connection, socket.create_connection((target.hostname, target.port)) as upstream:
                upstream.sendall(receive_json(connection))
                answer = receive_json(upstream)
                if number == num_lost:
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    with listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        thread.join(PATIENCE_SECONDS)


def test_lost_answers_do_not_make_the_real_client_submit_twice(
    client: OpenAI, api_url: str, owner: Engine, tenant: Tenant
) -> None:
    file = upload(client, GOOD)
    with (
        answers_lost(api_url, num_lost=2) as flaky_url,
        OpenAI(base_url=flaky_url, api_key=tenant.api_key, max_retries=2) as flaky,
    ):
        job = submit(flaky, file.id)
    assert client.fine_tuning.jobs.retrieve(job.id).id == job.id
    assert num_jobs(owner, tenant) == 1


@pytest.mark.parametrize("key", ["slow", None])
def test_a_second_try_waits_for_the_first_that_is_under_way(
    client: OpenAI, api: Engine, owner: Engine, tenant: Tenant, key: str | None
) -> None:
    file_id = parse_id(IdKind.FILE, upload(client, GOOD).id)
    request = JobRequest(base_model_id=BASE_MODEL, training_file_id=file_id)

    def submit_again() -> Submission:
        with tenant_transaction(api, tenant.id) as session:
            return submit_once(session, tenant.id, request=request, idempotency_key=key, is_retry=True)

    with ThreadPoolExecutor(1) as pool:
        with tenant_transaction(api, tenant.id) as session:
            first = submit_once(session, tenant.id, request=request, idempotency_key=key, is_retry=False)
            second = pool.submit(submit_again)
            wait_until(lambda: num_waiting(owner) == 1 or second.done())
        assert second.result().job.id == first.job.id
        assert second.result().is_replayed
    assert num_jobs(owner, tenant) == 1


def num_waiting(owner: Engine) -> int:
    query = "select count(*) from pg_locks where not granted and database = (select oid from pg_database where datname = current_database())"
    with service_transaction(owner) as session:
        return int(session.scalars(text(query)).one())


def test_first_tries_of_equal_bodies_are_two_submissions(client: OpenAI, api: Engine, tenant: Tenant) -> None:
    file_id = parse_id(IdKind.FILE, upload(client, GOOD).id)
    request = JobRequest(base_model_id=BASE_MODEL, training_file_id=file_id)
    jobs = set()
    for _ in range(2):
        with tenant_transaction(api, tenant.id) as session:
            jobs.add(submit_once(session, tenant.id, request=request, idempotency_key=None, is_retry=False).job.id)
    assert len(jobs) == 2
