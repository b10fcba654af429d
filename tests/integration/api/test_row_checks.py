"""Rows that a known tokenizer cannot render are refused when the job is submitted, at the cost of one check."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from sqlalchemy import Engine, text

from api.previews import Previewer
from api.row_checks import RowChecker
from core.db.session import service_transaction
from core.domain.errors import InvalidRequestError
from core.domain.ids import IdKind, parse_id
from core.domain.objects import tokenizer_key
from core.services.submissions import DatasetRows
from core.storage import S3ObjectStore
from local.servers import ServerAddresses
from tests.bundles import CHATML, letters_bundle
from tests.chat_templates import QWEN_3_THINKING
from tests.factories.bases import BASE_MODEL, publish_tokenizer
from tests.factories.files import upload_rows

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('There is no system role.') }}{% endif %}" + CHATML
PLAIN = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
WITH_SYSTEM = [{"role": "system", "content": "Be kind."}, *PLAIN]


def rows_of(*conversations: list[dict[str, str]]) -> list[str]:
    return [json.dumps({"messages": messages}) for messages in conversations]


def submit(client: OpenAI, rows: list[str], *, validation: list[str] | None = None, **options: Any) -> Any:
    validation_file = upload_rows(client, validation).id if validation else None
    return client.fine_tuning.jobs.create(
        model=BASE_MODEL,
        training_file=upload_rows(client, rows).id,
        validation_file=validation_file,
        extra_body=options,
    )


def refusal_of(client: OpenAI, *args: Any, **options: Any) -> dict[str, Any]:
    with pytest.raises(BadRequestError) as refused:
        submit(client, *args, **options)
    body = refused.value.body
    assert isinstance(body, dict)
    return body


@pytest.fixture
def refuses_system(owner: Engine, servers: ServerAddresses) -> None:
    publish_tokenizer(owner, servers, letters_bundle(NO_SYSTEM).model_dump_json(), sha256="2" * 64)


def count_jobs(owner: Engine) -> int:
    with service_transaction(owner) as session:
        return int(session.scalar(text("select count(*) from jobs")) or 0)


@pytest.mark.usefixtures("refuses_system")
def test_rows_that_the_template_refuses_are_refused_with_file_and_line_and_no_job_is_left(
    client: OpenAI, owner: Engine
) -> None:
    before = count_jobs(owner)
    refusal = refusal_of(client, rows_of(PLAIN, WITH_SYSTEM))
    assert (refusal["code"], refusal["param"]) == ("template_refused", "training_file")
    assert refusal["message"] == (
        "Line 2 of the training file: The base's chat template refuses this conversation: There is no system role. "
        "Change the row, or choose another base model."
    )
    refusal = refusal_of(client, rows_of(PLAIN), validation=rows_of(PLAIN, PLAIN, WITH_SYSTEM))
    assert (refusal["code"], refusal["param"]) == ("template_refused", "validation_file")
    assert refusal["message"].startswith("Line 3 of the validation file: ")
    assert count_jobs(owner) == before
    assert submit(client, rows_of(PLAIN)).status == "queued"


@pytest.mark.usefixtures("refuses_system")
def test_a_file_with_nothing_to_learn_within_the_length_is_refused(client: OpenAI) -> None:
    refusal = refusal_of(client, rows_of(PLAIN, PLAIN), max_seq_len=8)
    assert (refusal["code"], refusal["param"]) == ("nothing_to_learn", "training_file")
    assert refusal["message"] == (
        "No row of the training file has anything to learn. No answer begins within max_seq_len=8: raise it."
    )
    assert submit(client, rows_of(PLAIN, PLAIN), max_seq_len=200).status == "queued"


def test_a_file_whose_answers_a_base_would_not_be_asked_for_is_refused(
    client: OpenAI, owner: Engine, servers: ServerAddresses
) -> None:
    publish_tokenizer(owner, servers, QWEN_3_THINKING.make_bundle().model_dump_json(), sha256="3" * 64)
    refusal = refusal_of(client, rows_of(PLAIN, PLAIN))
    assert (refusal["code"], refusal["param"]) == ("nothing_to_learn", "training_file")
    assert "2 answers are left out" in refusal["message"]
    thought = [PLAIN[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSo."}]
    assert submit(client, rows_of(PLAIN, thought)).status == "queued"


def test_what_is_well_is_looked_at_once(servers: ServerAddresses, tmp_path: Path) -> None:
    store = S3ObjectStore(servers.storage)
    keys = f"looked-at-once/{tmp_path.name}/rows", tokenizer_key("5" * 64)
    for key, content in zip(keys, (rows_of(PLAIN)[0], letters_bundle().model_dump_json()), strict=True):
        store.put_bytes(key, content.encode(), content_type="application/json")
    previewer = Previewer(store)
    checker = RowChecker(previewer)
    rows = DatasetRows(
        file="training",
        tenant_id=uuid.uuid4(),
        object_key=keys[0],
        sha256="0" * 64,
        tokenizer_key=keys[1],
        max_seq_len=200,
    )
    assert not checker.knows(rows)
    checker.check(rows)
    assert checker.knows(rows)
    assert checker.knows(rows.model_copy(update={"object_key": "uploaded-again", "file": "validation"}))
    assert not checker.knows(rows.model_copy(update={"tenant_id": uuid.uuid4()}))
    assert not checker.knows(rows.model_copy(update={"sha256": "1" * 64}))
    short = rows.model_copy(update={"max_seq_len": 8})
    for _ in range(2):
        assert not checker.knows(short)
        with pytest.raises(InvalidRequestError):
            checker.check(short)
    previewer._exits.close()


@pytest.mark.usefixtures("refuses_system")
def test_a_file_that_is_damaged_in_the_store_is_left_to_the_worker(
    client: OpenAI, owner: Engine, servers: ServerAddresses
) -> None:
    file = upload_rows(client, rows_of(PLAIN, PLAIN))
    with service_transaction(owner) as session:
        key = session.scalar(
            text("select object_key from files where id = :id"), {"id": parse_id(IdKind.FILE, file.id)}
        )
    S3ObjectStore(servers.storage).put_bytes(str(key), b'{"messages": [{"role": "us', content_type="text/plain")
    assert client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file.id).status == "queued"


def test_where_no_worker_has_loaded_the_base_a_job_is_accepted(client: OpenAI, owner: Engine) -> None:
    with service_transaction(owner) as session:
        session.execute(text("delete from base_tokenizers"))
    assert submit(client, rows_of(WITH_SYSTEM)).status == "queued"


def test_where_the_rows_cannot_be_seen_a_job_is_accepted(
    client: OpenAI, owner: Engine, servers: ServerAddresses
) -> None:
    """A template that passes the limits of its process; the worker has none."""
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    publish_tokenizer(owner, servers, letters_bundle(endless).model_dump_json(), sha256="4" * 64)
    assert submit(client, rows_of(PLAIN)).status == "queued"
