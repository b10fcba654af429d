"""A bad file or a refusal of the object store ends only its own job, and the error names the file."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import pytest

from tests.integration.trainer.object_store import Store, break_hash
from tests.integration.trainer.supervision import Supervisor, make_order
from worker.messages import (
    JobFailed,
    JobLogged,
    JobSucceeded,
    RemoteFile,
    RemoteResumePoint,
)
from worker.trainer.resume import RESUME_FILES


def lose(file: RemoteFile) -> RemoteFile:
    return file.model_copy(update={"url": file.url + "-that-is-not-there"})


ROW = b'{"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "1"}]}'
SECRET = b'{"messages": [{"role": "user", "content": "sesame"}, {"role": "assistant", "content": 7}]}'


@pytest.mark.parametrize("name", ["training", "validation"])
@pytest.mark.parametrize(
    ("content", "change", "code", "words", "place"),
    [
        (
            ROW + b"\n" + SECRET,
            None,
            "invalid_training_data",
            "Line 2 of the {} file, messages[1].content: ",
            {"line": 2, "field": "messages[1].content"},
        ),
        (b"", None, "invalid_training_data", "The {} file has no rows.", {}),
        (ROW.replace(b'"1"', b'"%s"' % (b"1" * 300)), None, "invalid_job", "In the {} file: An example has ", {}),
        (ROW, break_hash, "integrity", "The {} file could not be fetched: Its bytes are not", {}),
        (ROW, lose, "storage_refused", "The {} file could not be fetched: The object store answered 404", {}),
    ],
    ids=["line", "empty", "too long", "damaged", "missing"],
)
def test_what_is_wrong_with_a_file_names_the_file(
    supervisor: Supervisor,
    store: Store,
    name: str,
    content: bytes,
    change: Callable[[RemoteFile], RemoteFile] | None,
    code: str,
    words: str,
    place: dict[str, Any],
) -> None:
    files = {"training": store.add_rows("rows"), "validation": store.add_rows("others")}
    files[name] = store.add("bad", content)
    if change is not None:
        files[name] = change(files[name])
    supervisor.send(make_order(files["training"], validation_file=files["validation"], max_seq_len=500))
    failed = supervisor.wait_for(JobFailed)
    assert failed.message.startswith(words.format(name)), failed.message
    assert (failed.code, failed.param) == (code, f"{name}_file")
    (line,) = [report for report in supervisor.told(JobLogged) if report.name == "job.failed"]
    assert line.details == {"code": code, "file": name, **place}
    assert "sesame" not in failed.message


def test_an_artifact_that_cannot_be_stored_is_named(supervisor: Supervisor, store: Store) -> None:
    store.refused = "/adapter/"
    supervisor.send(make_order(store.add_rows("rows"), n_epochs=1))
    failed = supervisor.wait_for(JobFailed)
    assert failed.message == "The adapter could not be stored: The object store answered 403."
    assert (failed.code, failed.param) == ("storage_url_refused", None)
    assert store.num_granted == 3, "URLs are asked for anew, twice"


# What S3 answers to a URL that it does not take.
EXPIRED = (HTTPStatus.BAD_REQUEST, b"<Error><Code>ExpiredToken</Code><Message>It has expired.</Message></Error>")
DENIED = (HTTPStatus.FORBIDDEN, b"<Error><Code>AccessDenied</Code></Error>")


@pytest.mark.parametrize("refusal", [EXPIRED, DENIED], ids=["expired token", "denied"])
@pytest.mark.parametrize("refused", ["/rows", "/valid", "/point/", "/adapter/"])
def test_a_url_that_the_store_refuses_ends_its_own_job_only_and_says_so(
    supervisor: Supervisor, store: Store, refused: str, refusal: tuple[HTTPStatus, bytes]
) -> None:
    store.refused, store.refusal = refused, refusal
    files = {name: store.add(f"point/{name}", b"{}") for name in RESUME_FILES}
    order = make_order(
        store.add_rows("rows"),
        validation_file=store.add_rows("valid"),
        resume_points=(RemoteResumePoint(step=1, files=files),) if refused == "/point/" else (),
        n_epochs=1,
    )
    supervisor.send(order)
    failed = supervisor.wait_for(JobFailed)
    assert (failed.code, failed.is_job_fault) == ("storage_url_refused", False)
    assert failed.message.endswith(f": The object store answered {refusal[0]}."), failed.message
    store.refused = None
    supervisor.send(make_order(store.add_rows("next"), lease_token=2, n_epochs=1))
    supervisor.wait_for(JobSucceeded, 2)


def test_a_400_that_says_nothing_of_the_url_is_a_refusal_of_the_request(supervisor: Supervisor, store: Store) -> None:
    store.refused, store.refusal = "/rows", (HTTPStatus.BAD_REQUEST, b"<Error><Code>InvalidRequest</Code></Error>")
    supervisor.send(make_order(store.add_rows("rows")))
    assert supervisor.wait_for(JobFailed).code == "storage_refused"


def test_an_artifact_whose_urls_have_expired_is_stored_under_new_ones(supervisor: Supervisor, store: Store) -> None:
    store.refused, store.num_to_refuse = "/adapter/", 2
    supervisor.send(make_order(store.add_rows("rows"), n_epochs=1))
    supervisor.wait_for(JobSucceeded)
    assert (store.num_refused, store.num_granted) == (2, 3)
