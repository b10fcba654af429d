"""A dataset's report on the file object, and its rows as a base tokenises them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import Engine, text

from core.db.session import service_transaction
from local.servers import ServerAddresses
from tests.bundles import letters_bundle
from tests.factories.bases import BASE_MODEL, publish_tokenizer
from tests.factories.files import upload_rows
from tests.factories.tenants import Tenant
from tests.waiting import PATIENCE_SECONDS

GOOD = [
    json.dumps({"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "A" * n}]})
    for n in range(1, 101)
]


@pytest.fixture
def published(owner: Engine, servers: ServerAddresses) -> None:
    publish_tokenizer(owner, servers, letters_bundle().model_dump_json(), sha256="1" * 64)


def preview(api_url: str, tenant: Tenant, file_id: str, **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    url = f"{api_url}/v1/files/{file_id}/preview"
    return httpx.post(
        url, json={"model": BASE_MODEL, **body}, headers=headers, timeout=PATIENCE_SECONDS, trust_env=False
    )


def test_a_file_carries_up_to_100_problems_and_counts_of_all(client: OpenAI) -> None:
    rows = ["not json", *GOOD, '{"messages": []}'] * 101
    file = upload_rows(client, rows)
    assert file.status == "error"
    problems = file.model_extra["problems"]
    assert len(problems) == 100
    assert set(problems[0]) == {"line", "path", "code", "message", "hint"}
    assert file.model_extra["validation"] == {
        "num_problems": 202,
        "problem_counts": {"not_json": 101, "messages_missing": 101},
        "is_complete": True,
        "num_duplicates": 100 * 100,
        "num_compared": 101 * 100,
    }
    assert client.files.retrieve(file.id).model_extra == file.model_extra


@pytest.mark.usefixtures("published")
def test_rows_are_shown_as_tokens_with_what_is_learnt(client: OpenAI, api_url: str, tenant: Tenant) -> None:
    file = upload_rows(client, GOOD)
    shown = preview(api_url, tenant, file.id, from_line=3, rows=2, max_seq_len=60).json()
    assert [row["line"] for row in shown["data"]] == [3, 4]
    row = shown["data"][0]
    learnt = [token for token, learns in zip(row["tokens"], row["loss_mask"], strict=True) if learns]
    assert learnt == ["A", "A", "A", "<|im_end|>"]
    assert len(row["token_ids"]) == len(row["tokens"]) == row["num_tokens"] == 29
    counted = shown["statistics"]
    assert (counted["num_rows"], counted["is_whole_file"]) == (98, False)
    whole = preview(api_url, tenant, file.id, max_seq_len=60).json()["statistics"]
    assert (whole["num_rows"], whole["is_whole_file"], whole["longest_row_tokens"]) == (100, True, 128)
    assert (whole["num_truncated"], whole["num_nothing_to_learn"]) == (67, 0)
    assert sum(bucket["num_rows"] for bucket in whole["histogram"]) == 100


def test_without_a_loaded_base_the_tokenizer_is_said_to_be_unknown(
    client: OpenAI, api_url: str, tenant: Tenant, owner: Engine
) -> None:
    with service_transaction(owner) as session:
        session.execute(text("delete from base_tokenizers"))
    answer = preview(api_url, tenant, upload_rows(client, GOOD).id)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "tokenizer_unknown")


@pytest.mark.usefixtures("published")
def test_previews_are_bounded_and_of_ones_own_files(
    client: OpenAI, api_url: str, tenant: Tenant, other_tenant: Tenant
) -> None:
    file = upload_rows(client, GOOD)
    assert preview(api_url, other_tenant, file.id).status_code == 404
    for body in ({"rows": 51}, {"rows": 0}, {"from_line": 101}, {"max_seq_len": 257}, {"colour": "red"}):
        assert preview(api_url, tenant, file.id, **body).status_code == 400
    assert preview(api_url, tenant, file.id, model="gpt-9").status_code == 404


@pytest.mark.usefixtures("published")
def test_a_line_that_nobody_has_checked_is_not_read_to_its_end(client: OpenAI, api_url: str, tenant: Tenant) -> None:
    file = upload_rows(client, ["no"] * 10_000 + ["x" * (4 * 2**20), "no"])
    assert (file.status, file.model_extra["validation"]["is_complete"]) == ("error", False)
    for from_line in (9_900, 10_001, 10_002):
        answer = preview(api_url, tenant, file.id, from_line=from_line)
        refusal = answer.json()["error"]
        assert (answer.status_code, refusal["code"], refusal["param"]) == (400, "line_too_long", "from_line")
    assert preview(api_url, tenant, file.id, from_line=7_000).is_success


def test_a_hostile_template_costs_its_caller_an_error_and_nobody_else_a_thing(
    client: OpenAI, api_url: str, tenant: Tenant, owner: Engine, servers: ServerAddresses
) -> None:
    file = upload_rows(client, GOOD)
    publish_tokenizer(owner, servers, letters_bundle("{{ 9**(9**8) }}").model_dump_json(), sha256="2" * 64)
    answer = preview(api_url, tenant, file.id)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "preview_limit")
    assert client.models.list().data
