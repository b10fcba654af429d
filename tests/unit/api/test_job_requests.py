"""The body of a job: errors name the field as it was sent, say what is wrong, and where the field belongs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from fastapi import FastAPI, Header, Query
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from api.errors import install_error_handlers
from api.schemas.misplaced import OTHER_NAMES, find_misplaced
from api.schemas.openai.job_requests import CreateJob

FILE = "file-" + "0" * 32
GOOD = {"model": "m", "training_file": FILE}
app = FastAPI()
install_error_handlers(app)
client = TestClient(app)


@app.post("/jobs")
def read_job(
    body: CreateJob,
    limit: Annotated[int, Query(ge=1)] = 1,
    x_retries: Annotated[int, Header(ge=0)] = 0,
) -> dict[str, Any]:
    assert (limit, x_retries) == (1, 0)
    return body.to_request().model_dump(mode="json")


def refuse(body: Any, **options: Any) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    answer = client.post("/jobs", content=content, headers=headers, **options)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def accept(**fields: Any) -> dict[str, Any]:
    answer = client.post("/jobs", json=GOOD | fields)
    assert answer.status_code == 200, answer.text
    request: dict[str, Any] = answer.json()
    return request


def nest(path: str, value: Any) -> dict[str, Any]:
    first, _, rest = path.partition(".")
    return {first: nest(rest, value) if rest else value}


SUPERVISED = "method.supervised.hyperparameters"
MISPLACED = {
    "hyperparameters.learning_rate": "learning_rate",
    "hyperparameters.lora_rank": "adapter.rank",
    "hyperparameters.epochs": f"{SUPERVISED}.n_epochs",
    "adapter.r": "adapter.rank",
    "adapter.lora_alpha": "adapter.alpha",
    "adapter.lora_dropout": "adapter.dropout",
    "adapter.learning_rate": "learning_rate",
    "lora": "adapter",
    "lora_config": "adapter",
    "epochs": f"{SUPERVISED}.n_epochs",
    "num_epochs": f"{SUPERVISED}.n_epochs",
    "n_epochs": f"{SUPERVISED}.n_epochs",
    "batch_size": f"{SUPERVISED}.batch_size",
    "learning_rate_multiplier": f"{SUPERVISED}.learning_rate_multiplier",
    "lr": "learning_rate",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "dropout": "adapter.dropout",
    "target_modules": "adapter.target_modules",
    "max_length": "max_seq_len",
    "supervised": "method.supervised",
}


@pytest.mark.parametrize("sent", MISPLACED)
def test_a_field_in_the_wrong_place_is_pointed_to_the_right_one(sent: str) -> None:
    error = refuse(GOOD | nest(sent, 3))
    assert (error["param"], error["code"]) == (sent, "invalid_request")
    assert error["message"].startswith(f"`{sent}` is called `{MISPLACED[sent]}` here")
    assert ("at the top of the request" in error["message"]) == ("." in sent and "." not in MISPLACED[sent])


@pytest.mark.parametrize(
    ("method", "sent"),
    [
        ({"hyperparameters": {}}, "method.hyperparameters"),
        ({"n_epochs": 1}, "method.n_epochs"),
        ({"supervised": {"n_epochs": 1}}, "method.supervised.n_epochs"),
        ({"supervised": {"hyperparameters": {"learning_rate": 1}}}, f"{SUPERVISED}.learning_rate"),
    ],
)
def test_a_method_is_looked_into(method: dict[str, Any], sent: str) -> None:
    assert refuse(GOOD | {"method": {"type": "supervised"} | method})["param"] == sent


def test_another_method_is_refused_by_its_name_first() -> None:
    error = refuse(GOOD | {"method": {"type": "dpo", "dpo": {"hyperparameters": {}}, "n_epochs": 1}})
    assert (error["code"], error["param"]) == ("unsupported_method", "method.type")


def test_every_other_name_stands_for_a_field_that_there_is_and_is_none_itself() -> None:
    for name, ours in OTHER_NAMES.items():
        assert find_misplaced({name: 1}, CreateJob) is not None, (name, ours)
        assert name not in CreateJob.model_fields


@pytest.mark.parametrize("name", ["colour", "a b", "größe", "int", "str", "x-y", "\u0001", "a" * 1000])
@pytest.mark.parametrize("place", ["", "adapter", "hyperparameters"])
def test_a_field_that_nobody_has_is_named_as_it_was_sent(place: str, name: str) -> None:
    sent = f"{place}.{name}" if place else name
    error = refuse(GOOD | ({place: {name: 1}} if place else {name: 1}))
    assert error["param"] == sent[:200]
    assert error["message"] == f"{sent[:200]}: there is no such field."


BAD_FIELDS: dict[str, tuple[dict[str, Any], str, str]] = {
    # the fields, the parameter, words of the message
    "too small a rate": ({"learning_rate": 5e-324}, "learning_rate", "equal to 0.000000000001"),
    "a smaller rate": ({"learning_rate": 1e-323}, "learning_rate", "equal to 0.000000000001"),
    "a small rate": ({"learning_rate": 1e-13}, "learning_rate", "equal to 0.000000000001"),
    "too great a rate": ({"learning_rate": 1.5}, "learning_rate", "less than or equal to 1"),
    "no rate": ({"learning_rate": 0}, "learning_rate", "equal to 0.000000000001"),
    "text": ({"learning_rate": "fast"}, "learning_rate", "valid number"),
    "a rank that is text": ({"adapter": {"rank": "big"}}, "adapter.rank", "valid integer"),
    "a list's part": ({"adapter": {"target_modules": ["q", 3]}}, "adapter.target_modules", "'all-linear'"),
    "metadata": ({"metadata": {"a": 3}}, "metadata.a", "valid string"),
    "metadata named like a kind": ({"metadata": {"17": "x" * 600}}, "metadata.17", "512"),
    "no object": ({"adapter": 3}, "adapter", "dictionary or object"),
    "an id that is a number": ({"training_file": 17}, "training_file", "valid string"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_bad_value_is_refused_by_its_field(name: str) -> None:
    fields, param, words = BAD_FIELDS[name]
    error = refuse(GOOD | fields)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize("place", ["hyperparameters", SUPERVISED])
@pytest.mark.parametrize(
    ("multiplier", "words"),
    [
        (5e-324, "equal to 0.000001"),
        (1e-323, "equal to 0.000001"),
        (1e-13, "equal to 0.000001"),
        (0, "equal to 0.000001"),
        (1e4, "equal to 1000"),
    ],
)
def test_a_multiplier_out_of_bounds_is_refused_with_its_floor_or_ceiling(
    place: str, multiplier: float, words: str
) -> None:
    body = GOOD | nest(f"{place}.learning_rate_multiplier", multiplier)
    if "method" in body:
        body["method"]["type"] = "supervised"
    error = refuse(body)
    assert error["param"] == f"{place}.learning_rate_multiplier"
    assert words in error["message"]


def test_parameters_outside_the_body_are_named_too() -> None:
    assert refuse(GOOD, params={"limit": 0})["param"] == "limit"
    assert refuse(GOOD, headers={"x-retries": "-1"})["param"] == "x-retries"


BAD_BODIES = {
    "single quotes": (b"{'model': 'm'}", "Line 1, column 2: single quotes stand where JSON has double quotes."),
    "a comma too many": (b'{\n  "model": "m",\n}', "Line 3, column 1: a comma stands before a closing bracket."),
    "Python's None": (b'{"model": "m", "seed": None}', "Line 1, column 24: None is Python's. Write null."),
    "two objects": (b"{} {}", "Line 1, column 4: a second value begins after the first."),
    "cut": (b'{"model": "m"', "Line 1, column 14: the text ends where more should follow."),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_body_that_is_not_json_is_told_where_and_why(name: str) -> None:
    body, words = BAD_BODIES[name]
    error = refuse(body)
    assert error["param"] is None
    assert error["message"].startswith("The body is not JSON. " + words)
    assert error["message"].endswith(".")
    assert ".." not in error["message"]


def test_no_body_and_no_object_are_told_as_such() -> None:
    assert refuse(b"")["message"] == "The body is missing: send a JSON object."
    assert refuse(b"[1]")["message"] == "The body is not a JSON object, sent as application/json."
    assert refuse(b"[1]")["param"] is None


FIELDS = st.text(max_size=6) | st.sampled_from([*CreateJob.model_fields, *OTHER_NAMES, "rank", "type", "int", "17"])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(FILE),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(FIELDS, inner, max_size=3),
    max_leaves=8,
)


@given(fields=st.dictionaries(FIELDS, VALUES, max_size=5))
def test_a_refusal_names_a_field_that_was_sent_or_is_missing(fields: dict[str, Any]) -> None:
    answer = client.post(
        "/jobs", content=json.dumps(GOOD | fields).encode(), headers={"content-type": "application/json"}
    )
    assert answer.status_code in {200, 400}, answer.text
    if answer.status_code == 400 and (param := answer.json()["error"]["param"]) is not None:
        assert param.startswith(
            tuple(name.encode("utf-8", "backslashreplace").decode()[:200] for name in GOOD | fields)
        )


def test_a_rate_and_a_multiplier_together_are_refused() -> None:
    for place in ("hyperparameters", SUPERVISED):
        body = GOOD | {"learning_rate": 1e-4} | nest(f"{place}.learning_rate_multiplier", 2.0)
        if "method" in body:
            body["method"]["type"] = "supervised"
        error = refuse(body)
        assert error["param"] == "learning_rate"
        assert "give one of them" in error["message"]
    request = accept(learning_rate=1e-4, hyperparameters={"learning_rate_multiplier": "auto"})
    assert request["learning_rate"] == 1e-4


@pytest.mark.parametrize("text", ["", "x", "file-", "file-" + "0" * 31, "file-" + "A" * 32, "ftjob-" + "0" * 32])
@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_what_is_no_files_id_is_a_file_that_is_not_there(param: str, text: str) -> None:
    error = refuse(GOOD | {param: text})
    shown = text or '""'
    assert (error["param"], error["code"]) == (param, "file_not_found")
    assert error["message"] == f"No such File object: {shown}"


def test_no_validation_file_is_null_or_nothing() -> None:
    assert accept()["validation_file_id"] is None
    assert accept(validation_file=None)["validation_file_id"] is None


@pytest.mark.parametrize(
    ("adapter", "alpha"),
    [
        ({}, None),
        ({"rank": 8}, None),
        ({"alpha": None}, None),
        ({"alpha": 32}, None),
        ({"rank": 8, "alpha": 16}, None),
        ({"rank": 8, "alpha": 32}, 32),
        ({"alpha": 16.5}, 16.5),
        ({"rank": 10**400}, None),
    ],
)
def test_an_alpha_that_is_the_default_of_its_rank_is_the_same_request(
    adapter: dict[str, Any], alpha: float | None
) -> None:
    assert accept(adapter=adapter)["alpha"] == alpha
