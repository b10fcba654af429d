"""The requests of OpenAI's own client to a fine-tuning service, as a script. Each client version runs it separately.

    python client_matrix.py BASE_URL API_KEY FULL_KEY MODEL

FULL_KEY belongs to a tenant whose queue is full. Every check prints one line; the exit status says whether all passed.
Answers are validated strictly. Only `paused`, which the live API has and the specification lacks, needs a lenient
client.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

BASE_URL, API_KEY, FULL_KEY, MODEL = sys.argv[1:]
ROWS = b"\n".join(
    json.dumps(
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
    ).encode()
    for n in range(12)
)
NUMBERS = {"n_epochs": 3, "batch_size": 4}
ENDED = ("succeeded", "failed", "cancelled")
CHECKS: list[tuple[str, Callable[[], None]]] = []

client = OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, _strict_response_validation=True)
lenient = OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0)
jobs = client.fine_tuning.jobs
made: dict[str, Any] = {}


def check(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(function: Callable[[], None]) -> Callable[[], None]:
        CHECKS.append((name, function))
        return function

    return register


def refused(kind: type[openai.APIStatusError], ask: Callable[[], Any], *, code: str) -> openai.APIStatusError:
    try:
        ask()
    except openai.APIStatusError as error:
        assert type(error) is kind, f"{type(error).__name__} is not {kind.__name__}"
        assert error.code == code, error.code
        assert error.type, error
        assert error.request_id.startswith("req_"), error.request_id  # type: ignore[union-attr]
        return error
    raise AssertionError(f"not refused with {kind.__name__}")


def upload(**options: Any) -> Any:
    return client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune", **options)


def submit(**options: Any) -> Any:
    return jobs.create(**{"model": MODEL, "training_file": made["file"], **options})


def wait_for(job_id: str, is_there: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 600
    while not is_there(job := lenient.fine_tuning.jobs.retrieve(job_id)):
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    return job


@check("files.create")
def create_file() -> None:
    file = upload()
    assert (file.object, file.bytes, file.purpose, file.filename) == ("file", len(ROWS), "fine-tune", "rows.jsonl")
    made["file"] = file.id


@check("files.create with expires_after")
def create_expiring_file() -> None:
    file = upload(expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600


@check("files.retrieve and wait_for_processing")
def retrieve_file() -> None:
    assert client.files.retrieve(made["file"]).id == made["file"]
    assert client.files.wait_for_processing(made["file"]).status == "processed"


@check("files.list, over pages, by purpose")
def list_files() -> None:
    extra = [upload().id for _ in range(3)]
    listed = [file.id for file in client.files.list(purpose="fine-tune", limit=2)]
    assert [each for each in listed if each in extra] == extra[::-1]
    assert made["file"] in listed
    assert [file.id for file in client.files.list(limit=2, order="asc")] == listed[::-1]


@check("files.content")
def file_content() -> None:
    assert client.files.content(made["file"]).read() == ROWS


@check("files.delete")
def delete_file() -> None:
    file = upload()
    assert client.files.delete(file.id).deleted
    refused(openai.NotFoundError, lambda: client.files.retrieve(file.id), code="not_found")


@check("uploads.create, parts.create, complete")
def upload_in_parts() -> None:
    begun = client.uploads.create(bytes=len(ROWS), filename="r.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    assert begun.status == "pending"
    parts = [client.uploads.parts.create(begun.id, data=data) for data in (ROWS[100:], ROWS[:100])]
    assert {part.upload_id for part in parts} == {begun.id}
    done = client.uploads.complete(begun.id, part_ids=[parts[1].id, parts[0].id], md5=hashlib.md5(ROWS).hexdigest())
    assert done.status == "completed"
    assert done.file is not None
    assert client.files.content(done.file.id).read() == ROWS


@check("uploads.upload_file_chunked")
def upload_chunked() -> None:
    done = client.uploads.upload_file_chunked(
        file=ROWS, filename="r.jsonl", bytes=len(ROWS), mime_type="text/jsonl", purpose="fine-tune", part_size=500
    )
    assert done.status == "completed"


@check("uploads.cancel")
def cancel_upload() -> None:
    begun = client.uploads.create(bytes=9, filename="r.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    assert client.uploads.cancel(begun.id).status == "cancelled"


@check("models.list and retrieve, with a slash")
def base_models() -> None:
    assert MODEL in {model.id for model in client.models.list()}
    assert client.models.retrieve(MODEL).object == "model"


@check("jobs.create, with method and metadata")
def create_job() -> None:
    job = submit(
        method={"type": "supervised", "supervised": {"hyperparameters": NUMBERS}},
        validation_file=made["file"],
        metadata={"team": "red"},
        suffix="m",
        seed=7,
    )
    assert job.status in ("validating_files", "queued", "running")
    assert (job.object, job.model, job.seed, job.metadata) == ("fine_tuning.job", MODEL, 7, {"team": "red"})
    assert job.method is not None
    assert job.method.type == "supervised"
    made["job"] = job.id


@check("jobs.create, with hyperparameters at the top")
def create_old_job() -> None:
    job = submit(hyperparameters=NUMBERS)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (3, 4)
    assert jobs.cancel(job.id).status == "cancelled"


@check("jobs.create, with our own fields in extra_body")
def create_extended_job() -> None:
    job = submit(extra_body={"adapter": {"rank": 4}, "learning_rate": 0.001})
    assert job.model_extra["adapter"]["rank"] == 4
    assert jobs.cancel(job.id).status == "cancelled"


@check("jobs.create, twice with one Idempotency-Key")
def create_once() -> None:
    headers = {"Idempotency-Key": f"matrix-{openai.__version__}"}
    first = submit(seed=1, extra_headers=headers)
    assert submit(seed=1, extra_headers=headers).id == first.id
    refused(
        openai.UnprocessableEntityError, lambda: submit(seed=2, extra_headers=headers), code="idempotency_key_reused"
    )
    jobs.cancel(first.id)


@check("jobs.list, over pages and by metadata")
def list_jobs() -> None:
    listed = [job.id for job in jobs.list(limit=2)]
    assert len(listed) == len(set(listed)) >= 3
    assert made["job"] in listed
    assert made["job"] in [job.id for job in jobs.list(metadata={"team": "red"})]
    assert made["job"] not in [job.id for job in jobs.list(extra_query={"metadata": "null"})]


@check("jobs.retrieve, until it has succeeded")
def await_job() -> None:
    wait_for(made["job"], lambda job: job.status in ENDED)
    job = jobs.retrieve(made["job"])
    assert job.status == "succeeded", job.error
    assert job.finished_at
    assert job.trained_tokens
    made["model"] = job.fine_tuned_model
    assert client.files.content(job.result_files[0]).text.startswith("step,")


@check("jobs.list_events, over pages, newest first")
def list_events() -> None:
    events = list(jobs.list_events(made["job"], limit=2))
    assert len(events) == len({event.id for event in events}) > 6
    assert {event.type for event in events} == {"message", "metrics"}
    assert [event.created_at for event in events] == sorted((event.created_at for event in events), reverse=True)
    assert "successfully completed" in events[0].message


@check("jobs.checkpoints.list, over pages")
def list_checkpoints() -> None:
    checkpoints = list(jobs.checkpoints.list(made["job"], limit=1))
    assert [each.step_number for each in checkpoints] == [9, 6, 3]
    assert checkpoints[0].metrics.full_valid_loss is not None
    made["checkpoint"] = checkpoints[0].fine_tuned_model_checkpoint


@check("models.retrieve, of ft: names with slashes and colons")
def tuned_models() -> None:
    assert made["model"].startswith(f"ft:{MODEL}:")
    for name in (made["model"], made["checkpoint"]):
        assert client.models.retrieve(name).id == name


@check("checkpoints.permissions.create, list or retrieve, delete")
def share_checkpoint() -> None:
    permissions = client.fine_tuning.checkpoints.permissions
    ids = [each.id for each in permissions.create(made["checkpoint"], project_ids=["p1", "p2", "p3"])]
    if hasattr(permissions, "list"):
        listed = [each.id for each in permissions.list(made["checkpoint"], limit=2)]
    else:
        listed = [each.id for each in permissions.retrieve(made["checkpoint"], limit=3).data]
    assert listed == ids[::-1]
    gone = permissions.delete(ids[0], fine_tuned_model_checkpoint=made["checkpoint"])
    assert gone.deleted


@check("jobs.pause and resume")
def pause_and_resume() -> None:
    job = submit(hyperparameters={"n_epochs": 50, "batch_size": 1})
    lenient.fine_tuning.jobs.pause(job.id)
    wait_for(job.id, lambda job: job.status == "paused")
    assert lenient.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    assert jobs.cancel(job.id).status == "cancelled"


@check("jobs.cancel, of a running job")
def cancel_running() -> None:
    job = submit(hyperparameters={"n_epochs": 50, "batch_size": 1})
    wait_for(job.id, lambda job: job.status == "running")
    assert jobs.cancel(job.id).status == "cancelled"


@check("errors: 400 BadRequestError")
def bad_request() -> None:
    error = refused(openai.BadRequestError, lambda: submit(hyperparameters={"n_epochs": 51}), code="invalid_request")
    assert error.param == "hyperparameters.n_epochs"
    refused(openai.BadRequestError, lambda: submit(method={"type": "dpo", "dpo": {}}), code="unsupported_method")
    refused(openai.BadRequestError, lambda: submit(model=made["model"]), code="warm_start_unsupported")


@check("errors: 401 AuthenticationError")
def unauthenticated() -> None:
    stranger = OpenAI(base_url=BASE_URL, api_key="sk-nobody", max_retries=0)
    refused(openai.AuthenticationError, stranger.models.list, code="invalid_api_key")


@check("errors: 403 PermissionDeniedError")
def forbidden() -> None:
    refused(openai.PermissionDeniedError, lambda: client.models.delete(MODEL), code="permission_denied")


@check("errors: 404 NotFoundError")
def not_found() -> None:
    refused(openai.NotFoundError, lambda: jobs.retrieve("ftjob-" + "0" * 32), code="not_found")
    refused(openai.NotFoundError, lambda: client.models.retrieve("ft:a/b:c::d"), code="model_not_found")
    refused(openai.NotFoundError, lambda: client.get("/nowhere", cast_to=object), code="unknown_url")


@check("errors: 409 ConflictError, not retried")
def conflict() -> None:
    stubborn = OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=5)
    error = refused(openai.ConflictError, lambda: stubborn.fine_tuning.jobs.cancel(made["job"]), code="conflict")
    assert error.request.headers["x-stainless-retry-count"] == "0"


@check("errors: 429 RateLimitError")
def rate_limited() -> None:
    full = OpenAI(base_url=BASE_URL, api_key=FULL_KEY, max_retries=0)
    file = full.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    ask = lambda: full.fine_tuning.jobs.create(model=MODEL, training_file=file.id)  # noqa: E731
    error = refused(openai.RateLimitError, ask, code="queue_quota_exceeded")
    assert int(error.response.headers["retry-after"]) > 0


@check("errors: 501 InternalServerError, for graders")
def graders() -> None:
    grader: Any = {"type": "string_check", "name": "g", "input": "a", "reference": "a", "operation": "eq"}
    refused(
        openai.InternalServerError,
        lambda: client.fine_tuning.alpha.graders.validate(grader=grader),
        code="not_supported",
    )
    refused(
        openai.InternalServerError,
        lambda: client.fine_tuning.alpha.graders.run(grader=grader, model_sample="a"),
        code="not_supported",
    )


@check("the asynchronous client walks pages too")
def asynchronous() -> None:
    async def walk() -> list[str]:
        async with AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY, _strict_response_validation=True) as other:
            return [job.id async for job in other.fine_tuning.jobs.list(limit=2)]

    assert made["job"] in asyncio.run(walk())


@check("models.delete, of a checkpoint and of an ft: name")
def delete_models() -> None:
    for name in (made["checkpoint"], made["model"]):
        assert client.models.delete(name).deleted
        refused(openai.NotFoundError, partial(client.models.retrieve, name), code="model_not_found")


def main() -> int:
    num_failed = 0
    for name, function in CHECKS:
        try:
            function()
        except Exception:  # noqa: BLE001 (a failed check is a line, and the next one runs)
            num_failed += 1
            print(f"FAIL  {name}\n{traceback.format_exc()}", flush=True)
        else:
            print(f"ok    {name}", flush=True)
    print(f"openai {openai.__version__}: {len(CHECKS) - num_failed} of {len(CHECKS)} checks passed", flush=True)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
