"""The wire as OpenAI's clients know it: headers, lists, the two spellings, and refusals by name."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import Engine

from core.domain.ids import IdKind, parse_id
from tests.factories.files import GOOD, upload
from tests.factories.jobs import add_adapter, submit
from tests.factories.tenants import Tenant
from tests.waiting import PATIENCE_SECONDS


@pytest.fixture
def file_id(client: OpenAI) -> str:
    return str(upload(client, GOOD).id)


@contextmanager
def bug_in_adapters(owner: Engine) -> Iterator[None]:
    """Let whatever asks for adapters fail as nobody expects: their table has another name."""
    with owner.begin() as connection:
        connection.exec_driver_sql("alter table adapters rename to adapters_elsewhere")
    try:
        yield
    finally:
        with owner.begin() as connection:
            connection.exec_driver_sql("alter table adapters_elsewhere rename to adapters")


def test_every_answer_has_a_request_id_of_its_own(client: OpenAI, api_url: str, owner: Engine) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.files.retrieve("file-nothing")
    with bug_in_adapters(owner), pytest.raises(openai.InternalServerError) as failed:
        client.models.list()
    assert (failed.value.status_code, failed.value.code) == (500, "internal_error")
    assert failed.value.response.headers["x-content-type-options"] == "nosniff"
    ids = {
        httpx.get(f"{api_url}{path}", timeout=PATIENCE_SECONDS).headers["x-request-id"]
        for path in ("/livez", "/nowhere", "/v1/models")
    }
    ids |= {str(refused.value.request_id), str(failed.value.request_id)}
    assert len(ids) == 5
    assert all(request_id.startswith("req_") for request_id in ids)


@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), ("/livez", 405), ("/v1/files", 401)])
def test_every_refusal_is_an_error_object(api_url: str, path: str, status: int) -> None:
    answer = httpx.post(f"{api_url}{path}", timeout=PATIENCE_SECONDS)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_conflict_is_not_retried_by_the_client(client: OpenAI, owner: Engine, tenant: Tenant, file_id: str) -> None:
    job = submit(client, file_id)
    add_adapter(owner, tenant, job.id)
    with pytest.raises(openai.ConflictError) as refused:
        client.fine_tuning.jobs.cancel(job.id)
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_a_full_queue_is_told_when_to_come_back(client: OpenAI, owner: Engine, tenant: Tenant, file_id: str) -> None:
    with owner.begin() as connection:
        connection.exec_driver_sql(f"update tenants set max_queued = 0 where id = '{tenant.id}'")
    with pytest.raises(openai.RateLimitError) as refused:
        submit(client, file_id)
    assert int(refused.value.response.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}},
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}}}},
        {"method": {"type": "supervised"}, "hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}},
    ],
    ids=["top", "method", "split"],
)  # fmt: skip
def test_hyperparameters_are_read_in_both_spellings(client: OpenAI, file_id: str, options: dict[str, Any]) -> None:
    job = submit(client, file_id, **options)
    assert job.hyperparameters.model_dump() == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    assert job.method.supervised.hyperparameters.n_epochs == 2


@pytest.mark.parametrize(
    "method",
    [
        {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}},
        {"type": "reinforcement", "reinforcement": {"grader": {"type": "string_check"}}},
        {"type": "orpo", "orpo": {}},
    ],
    ids=lambda method: method["type"],
)
def test_another_method_is_refused_by_its_name(client: OpenAI, file_id: str, method: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=f"'{method['type']}' is not supported") as refused:
        submit(client, file_id, method=method)
    assert (refused.value.code, refused.value.param) == ("unsupported_method", "method.type")


def test_integrations_are_refused_clearly_and_none_are_accepted(client: OpenAI, file_id: str) -> None:
    with pytest.raises(openai.BadRequestError, match="not supported") as refused:
        submit(client, file_id, integrations=[{"type": "wandb", "wandb": {"project": "p"}}])
    assert (refused.value.code, refused.value.param) == ("unsupported_integration", "integrations")
    assert submit(client, file_id, integrations=None).status == "queued"
    assert submit(client, file_id, integrations=[]).integrations == []


@pytest.mark.parametrize("seed", [-1, 2**31, 10**400, 1.5, "x"])
def test_a_seed_out_of_bounds_is_refused(client: OpenAI, file_id: str, seed: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        submit(client, file_id, seed=seed)
    assert refused.value.param == "seed"


def test_jobs_are_filtered_by_their_metadata_or_the_lack_of_it(client: OpenAI, file_id: str) -> None:
    plain = submit(client, file_id)
    red = submit(client, file_id, metadata={"team": "red", "a b]": "&="})
    both = submit(client, file_id, metadata={"team": "red", "null": "null"})

    def listed(metadata: Any) -> list[str]:
        return [job.id for job in client.fine_tuning.jobs.list(metadata=metadata)]

    assert listed({"team": "red"}) == [both.id, red.id]
    assert listed({"team": "red", "a b]": "&="}) == [red.id]
    assert listed({"team": "blue"}) == []
    assert listed({"null": "null"}) == [both.id]
    null = client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert [job.id for job in null] == [plain.id]
    assert (plain.metadata, red.metadata) == (None, {"team": "red", "a b]": "&="})


def test_a_page_names_its_ends_and_whether_there_is_more(
    client: OpenAI, api_url: str, tenant: Tenant, file_id: str
) -> None:
    made = [submit(client, file_id).id for _ in range(3)][::-1]
    headers = {"authorization": f"Bearer {tenant.api_key}"}

    def page(**query: Any) -> Any:
        answer = httpx.get(
            f"{api_url}/v1/fine_tuning/jobs", params=query, headers=headers, timeout=PATIENCE_SECONDS
        ).json()
        return answer["first_id"], answer["last_id"], answer["has_more"], len(answer["data"])

    assert page(limit=2) == (made[0], made[1], True, 2)
    assert page(limit=2, after=made[1]) == (made[2], made[2], False, 1)
    assert page(after=made[2]) == (None, None, False, 0)
    assert page(limit=3) == (made[0], made[2], False, 3)


def test_events_are_walked_over_pages_newest_first_and_are_of_two_types(
    client: OpenAI, owner: Engine, file_id: str
) -> None:
    job = submit(client, file_id)
    for metadata in range(4):
        with owner.begin() as connection:
            connection.exec_driver_sql(
                "insert into events (id, tenant_id, job_id, level, type, message, details)"
                " select %s, tenant_id, id, 'info', 'metrics', %s, %s::jsonb from jobs where id = %s",
                (uuid.uuid4(), f"Step {metadata}", json.dumps({"step": metadata}), parse_id(IdKind.JOB, job.id)),
            )
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert [event.message for event in events][:4] == ["Step 3", "Step 2", "Step 1", "Step 0"]
    assert [event.type for event in events] == ["metrics"] * 4 + ["message"]
    assert events[0].data == {"step": 3}


def test_cancel_needs_no_body(client: OpenAI, api_url: str, tenant: Tenant, file_id: str) -> None:
    job = submit(client, file_id)
    headers = {"authorization": f"Bearer {tenant.api_key}", "content-type": "application/json"}
    answer = httpx.post(f"{api_url}/v1/fine_tuning/jobs/{job.id}/cancel", headers=headers, timeout=PATIENCE_SECONDS)
    assert answer.json()["status"] == "cancelled"


HOSTILE = {
    "nul": b'{"model": "a\\u0000b", "training_file": "file-0"}',
    "nul-in-metadata": b'{"model": "m", "training_file": "f", "metadata": {"a\\u0000": "b"}}',
    "surrogate": b'{"model": "\\ud800", "training_file": "file-0"}',
    "surrogate-in-metadata": b'{"model": "m", "training_file": "f", "metadata": {"\\udfff": "\\ud800"}}',
    "surrogate-in-method": b'{"model": "m", "training_file": "f", "method": {"type": "\\ud800"}}',
    "surrogate-as-field": b'{"model": "m", "training_file": "f", "\\ud800": 1}',
    "huge-integer": b'{"model": "m", "training_file": "f", "priority": 1' + b"0" * 400 + b"}",
    "huger-integer": b'{"model": "m", "training_file": "f", "seed": 1' + b"0" * 5000 + b"}",
    "huge-float": b'{"model": "m", "training_file": "f", "learning_rate": 1e400}',
    "nan": b'{"model": "m", "training_file": "f", "learning_rate": NaN}',
    "deep": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep-extra": b'{"model": "m", "training_file": "f", "integrations": ' + b"[" * 900 + b"]" * 900 + b"}",
    "not-utf8": b'{"model": "\xff"}',
    "not-an-object": b'"model"',
    "not-json": b"{",
    "empty": b"",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body_is_a_bad_request(api_url: str, tenant: Tenant, body: bytes) -> None:
    headers = {"authorization": f"Bearer {tenant.api_key}", "content-type": "application/json"}
    answer = httpx.post(f"{api_url}/v1/fine_tuning/jobs", content=body, headers=headers, timeout=PATIENCE_SECONDS)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] is not None


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/a%00b",
        "/v1/models/ft:%00",
        "/v1/files?purpose=%00",
        "/v1/files?after=%00",
        "/v1/fine_tuning/jobs?after=ftjob-%00",
        "/v1/fine_tuning/jobs?metadata[%00]=1",
        "/v1/fine_tuning/jobs?metadata[a]=%00",
        "/v1/fine_tuning/jobs?metadata[a]=%ed%a0%80",
        "/v1/fine_tuning/jobs?limit=1" + "0" * 400,
        "/v1/files/%ff%fe",
        "/v1/models/%ed%a0%80",
    ],
)
def test_a_hostile_address_is_refused(api_url: str, tenant: Tenant, path: str) -> None:
    answer = httpx.get(
        f"{api_url}{path}", headers={"authorization": f"Bearer {tenant.api_key}"}, timeout=PATIENCE_SECONDS
    )
    assert answer.status_code < 500, answer.text
