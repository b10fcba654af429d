"""Every invalid input is answered with OpenAI's error object that names the fault, and nothing is lost."""

from __future__ import annotations

import gzip
import pickle
import struct
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.factories.bases import BASE_MODEL
from tests.factories.files import GOOD, upload
from tests.factories.jobs import submit
from tests.public_rows import PUBLIC_FILES


@pytest.mark.fault(42)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_model.safetensors", pickle.dumps({"weights": [0.5] * 100})),
        ("adapter_model.safetensors", struct.pack("<Q", 2**30) + b'{"a": {"dtype": "F32"'),
        ("rows.jsonl.gz", gzip.compress(b"0" * 10**8)),
        ("rows.jsonl", gzip.compress(GOOD)[:-4]),
    ],
    ids=["pickle", "safetensors with a header of 1 GB", "a bomb of 100 MB", "gzip, cut"],
)
def test_row_42_what_is_not_jsonl_is_refused_by_its_first_line_and_unpacked_by_nobody(
    client: OpenAI, name: str, content: bytes
) -> None:
    file = upload(client, content, name)
    assert file.status == "error"
    assert file.status_details is not None
    assert file.status_details.startswith("Line 1")
    assert client.files.content(file.id).read() == content
    with pytest.raises(openai.BadRequestError, match="The file cannot be trained on"):
        submit(client, file.id)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GOOD + b"\nnot json", "Line 2, column 1: This is not JSON: a value stands without quotes"),
        (GOOD + b"\n" + GOOD.replace(b"Hi", b"\xff"), "Line 2: Byte"),
        (GOOD + b"\n\n" + GOOD, "Line 2: The line is empty"),
        (GOOD.replace(b'"user"', b'"wizard"'), "Line 1, messages[0].role: The role is 'wizard'"),
        (b'{"messages": [{"role": "user", "content": "Hi?"}]}', "Line 1, messages: There is no assistant message"),
        (b"[" * 100_000 + b"]" * 100_000, "Line 1: The JSON is nested too deeply"),
        (b'{"messages": NaN}', "Line 1: NaN is not JSON"),
        (b"", "Line 1: The file has no examples"),
        (b"\n\n", "Line 1: The file has no examples"),
        (b'{"prompt": "Hi?", "completion": "Hello."}', "Line 1: The row is a pair of `prompt` and `completion`"),
        (
            b"[" + GOOD + b"]",
            "Line 1: The file is one JSON array, not one object a line. jq -c '.[]' old.json > new.jsonl",
        ),
        (gzip.compress(GOOD), "Line 1: The file is packed with gzip. gunzip -c old.jsonl.gz > new.jsonl"),
        (GOOD + b"\n" + GOOD[:-9], "Line 2: The file ends in the middle of a row"),
        (GOOD.replace(b'"Hello."', b'"Hello.", "weight": 0'), "Line 1, messages: Every assistant weight is 0"),
    ],
    ids=[
        "not-jsonl",
        "not-utf8",
        "empty-line",
        "wrong-role",
        "no-assistant",
        "deep",
        "nan",
        "empty",
        "blank",
        "another-format",
        "array",
        "gzip",
        "cut",
        "nothing-to-learn",
    ],
)
def test_a_bad_row_puts_the_file_in_error_with_its_line(client: OpenAI, content: bytes, expected: str) -> None:
    file = upload(client, content)
    assert file.status == "error"
    assert file.status_details is not None
    assert file.status_details.startswith(expected)
    assert client.files.retrieve(file.id).status_details == file.status_details
    assert client.files.content(file.id).read() == content
    with pytest.raises(openai.BadRequestError, match="The file cannot be trained on: " + expected[:6]) as refused:
        submit(client, file.id)
    assert refused.value.param == "training_file"


@pytest.mark.parametrize("name", PUBLIC_FILES)
def test_a_file_as_public_tools_write_it_can_be_trained_on(client: OpenAI, name: str) -> None:
    file = upload(client, PUBLIC_FILES[name])
    assert (file.status, file.status_details) == ("processed", None)
    assert submit(client, file.id).status == "queued"


@pytest.mark.fault(38)
def test_a_200_mb_line_is_refused_by_its_number(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="Line 2 is longer than") as refused:
        upload(client, GOOD + b"\n" + b"x" * (200 * 2**20))
    assert (refused.value.status_code, refused.value.code) == (413, "line_too_long")
    assert client.files.list().data == []


@pytest.mark.parametrize("key", ["", "sk-nonsense", "esp_live_AAAAAAAAAAAA_" + "B" * 36])
def test_no_live_key_is_an_authentication_error(api_url: str, key: str) -> None:
    with (
        OpenAI(base_url=f"{api_url}/v1", api_key=key or "x", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"


def test_another_tenants_ids_are_not_found(client: OpenAI, other_client: OpenAI) -> None:
    file = upload(client, GOOD)
    job = submit(client, file.id)
    for ask in (
        lambda: other_client.files.retrieve(file.id),
        lambda: other_client.files.content(file.id),
        lambda: other_client.files.delete(file.id),
        lambda: other_client.fine_tuning.jobs.retrieve(job.id),
        lambda: other_client.fine_tuning.jobs.cancel(job.id),
        lambda: other_client.fine_tuning.jobs.list_events(job.id),
        lambda: other_client.fine_tuning.jobs.checkpoints.list(job.id),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    with pytest.raises(openai.BadRequestError, match="No such File object"):
        submit(other_client, file.id)
    assert other_client.files.list().data == []
    assert other_client.fine_tuning.jobs.list().data == []
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"extra_body": {"adapter": {"rank": 0}}}, "adapter.rank", "takes 1 to 64"),
        ({"extra_body": {"adapter": {"rank": 10_000}}}, "adapter.rank", "takes 1 to 64"),
        ({"extra_body": {"adapter": {"target_modules": ["q_proj", "w_proj"]}}}, "adapter.target_modules", "'w_proj'; it has q_proj, v_proj"),
        ({"suffix": "s" * 65}, "suffix", "64"),
        ({"extra_body": {"quantization": "int3"}}, "quantization", "nf4"),
        ({"extra_body": {"colour": "red"}}, "colour", "colour"),
        ({"method": {"type": "dpo", "dpo": {}}}, "method.type", "not supported yet"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", "50"),
        ({"extra_body": {"max_seq_len": 512}}, "max_seq_len", "at most 256"),
    ],
)  # fmt: skip
def test_a_bad_job_is_refused_by_the_field_at_fault(
    client: OpenAI, options: dict[str, Any], param: str, words: str
) -> None:
    file = upload(client, GOOD)
    with pytest.raises(openai.BadRequestError) as refused:
        submit(client, file.id, **options)
    assert str(refused.value.param).startswith(param)
    assert words in refused.value.message
    assert client.fine_tuning.jobs.list().data == []


def test_a_file_that_is_not_there_is_one_answer_whatever_its_id_looks_like(
    client: OpenAI, other_client: OpenAI
) -> None:
    deleted = upload(client, GOOD).id
    client.files.delete(deleted)
    missing = ["", "nothing", "file-nothing", "file-" + "0" * 32, upload(other_client, GOOD).id, deleted]
    good = upload(client, GOOD).id
    for param in ("training_file", "validation_file"):
        for file_id in missing:
            options: Any = {"training_file": good} | {param: file_id}
            with pytest.raises(openai.BadRequestError) as refused:
                client.fine_tuning.jobs.create(model=BASE_MODEL, **options)
            assert (refused.value.code, refused.value.param) == ("file_not_found", param)
            assert refused.value.body["message"] == "No such File object: " + (file_id or '""')  # type: ignore[index]
    assert client.fine_tuning.jobs.list().data == []


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("/files/{}", "file-", "No such File object: {}"),
        ("/files/{}/content", "file-", "No such File object: {}"),
        ("/fine_tuning/jobs/{}", "ftjob-", "Could not find fine tune: {}"),
        ("/fine_tuning/jobs/{}/events", "ftjob-", "Could not find fine tune: {}"),
        ("/adapters/{}", "adapter-", "No such adapter: {}"),
    ],
)
def test_what_is_not_there_is_one_answer_whatever_its_id_looks_like(
    client: OpenAI, path: str, kind: str, words: str
) -> None:
    for text in ("nothing", f"{kind}x", kind + "0" * 32):
        with pytest.raises(openai.NotFoundError) as refused:
            client.get(path.format(text), cast_to=object)
        assert (refused.value.code, refused.value.param) == ("not_found", None)
        assert refused.value.body["message"] == words.format(text)  # type: ignore[index]


@pytest.mark.parametrize("path", ["/files", "/fine_tuning/jobs", "/adapters"])
@pytest.mark.parametrize("after", ["", "nothing"])
def test_a_cursor_that_is_no_id_is_refused_and_starts_no_list_anew(client: OpenAI, path: str, after: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.get(f"{path}?after={after}", cast_to=object)
    assert refused.value.param == "after"


def test_alpha_is_twice_the_rank_unless_it_is_given(client: OpenAI) -> None:
    file = upload(client, GOOD)
    for adapter, alpha in (({}, 32), ({"rank": 8}, 16), ({"rank": 8, "alpha": 32}, 32), ({"alpha": 1}, 1)):
        job = submit(client, file.id, extra_body={"adapter": adapter})
        assert job.model_extra["adapter"]["alpha"] == alpha


def test_an_unknown_base_is_not_found_and_the_known_are_named(client: OpenAI) -> None:
    file = upload(client, GOOD)
    with pytest.raises(openai.NotFoundError, match=BASE_MODEL) as refused:
        submit(client, file.id, model="gpt-9")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_a_file_in_use_cannot_be_deleted_until_its_job_has_ended(client: OpenAI) -> None:
    file = upload(client, GOOD)
    job = submit(client, file.id)
    with pytest.raises(openai.ConflictError) as refused:
        client.files.delete(file.id)
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_lists_are_walked_over_several_pages(client: OpenAI) -> None:
    file = upload(client, GOOD)
    made = [submit(client, file.id, metadata={"number": str(number)}).id for number in range(5)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == made[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"number": "3"})] == [made[3]]


def test_auto_is_shown_as_numbers(client: OpenAI) -> None:
    job = submit(client, upload(client, GOOD).id, seed=5)
    assert job.hyperparameters.model_dump() == {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.0}
    assert job.model_extra["adapter"]["target_modules"] == ["q_proj", "v_proj"]
    assert (job.seed, job.status, job.fine_tuned_model) == (5, "queued", None)
