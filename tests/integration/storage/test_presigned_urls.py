"""A presigned URL opens one object for one verb and a short time, at the right host."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from core.settings import StorageConfig
from core.storage import (
    S3ObjectStore,
    StorageUnavailableError,
)
from tests.integration.storage.objects import MINUTE, TYPE, describe
from tests.waiting import PATIENCE_SECONDS


@pytest.mark.parametrize(
    "filename", ["adapter.tar", 'a"; x="b.txt', "a\r\nX-Evil: 1.txt", "données ☂.jsonl", "a\\b/c%20"]
)
def test_a_presigned_download_is_an_attachment_of_that_name(store: S3ObjectStore, prefix: str, filename: str) -> None:
    store.put_bytes(prefix + "object", b"content", content_type=TYPE)

    answer = httpx.get(
        store.presign_get(prefix + "object", expires=MINUTE, filename=filename), timeout=PATIENCE_SECONDS
    )

    assert answer.content == b"content"
    disposition = answer.headers["content-disposition"]
    assert disposition.startswith('attachment; filename="')
    assert disposition.count('"') == 2
    assert "x-evil" not in answer.headers
    encoded = disposition.partition("filename*=UTF-8''")[2]
    assert httpx.QueryParams(f"name={encoded.replace('+', '%2B')}")["name"] == filename


def test_a_presigned_upload_stores_the_object(store: S3ObjectStore, prefix: str) -> None:
    answer = httpx.put(
        store.presign_put(prefix + "object", expires=MINUTE), content=b"from outside", timeout=PATIENCE_SECONDS
    )
    assert answer.status_code == 200
    assert store.hash_object(prefix + "object") == describe(b"from outside")


def test_a_presigned_url_opens_one_object_for_one_verb_only(store: S3ObjectStore, prefix: str) -> None:
    store.put_bytes(prefix + "mine", b"mine", content_type=TYPE)
    store.put_bytes(prefix + "other", b"other", content_type=TYPE)
    url = store.presign_internal_get(prefix + "mine", expires=MINUTE)

    assert httpx.get(url, timeout=PATIENCE_SECONDS).content == b"mine"
    assert httpx.get(url.replace("mine", "other"), timeout=PATIENCE_SECONDS).status_code == 403
    assert httpx.put(url, content=b"overwritten", timeout=PATIENCE_SECONDS).status_code == 403
    assert httpx.get(url.replace("X-Amz-Expires=60", "X-Amz-Expires=6000"), timeout=PATIENCE_SECONDS).status_code == 403
    assert httpx.get(url.partition("?")[0], timeout=PATIENCE_SECONDS).status_code == 403


def test_tenants_urls_name_the_public_endpoint_and_the_trainers_the_internal_one(
    config: StorageConfig, prefix: str
) -> None:
    store = S3ObjectStore(replace(config, public_endpoint="objects.example.com"))
    public = store.presign_get(prefix + "x", expires=MINUTE, filename="x")
    internal = store.presign_put(prefix + "x", expires=MINUTE), store.presign_internal_get(prefix + "x", expires=MINUTE)
    assert urlsplit(public).netloc == "objects.example.com"
    assert {urlsplit(url).netloc for url in internal} == {config.endpoint}


@pytest.mark.parametrize("key", ["other/x", "/tenants/x", "tenants/../x", ""])
def test_only_keys_that_the_service_has_made_are_signed(store: S3ObjectStore, key: str) -> None:
    for sign in (store.presign_put, store.presign_internal_get):
        with pytest.raises(ValueError, match="Only keys"):
            sign(key, expires=MINUTE)
    with pytest.raises(ValueError, match="Only keys"):
        store.presign_get(key, expires=MINUTE, filename="x")


def test_no_url_lives_longer_than_fifteen_minutes(store: S3ObjectStore, prefix: str) -> None:
    assert store.presign_put(prefix + "x", expires=timedelta(minutes=15))
    for lifetime in (timedelta(minutes=15, seconds=1), timedelta()):
        with pytest.raises(ValueError, match="at most"):
            store.presign_put(prefix + "x", expires=lifetime)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_store_that_is_given_the_time_signs_with_it_and_not_with_its_hosts_clock(
    config: StorageConfig, prefix: str, hours: int
) -> None:
    """A host that is an hour off, seen from the server, is the same as a server that is, seen from the host."""

    def read_clock() -> dt.datetime:
        return dt.datetime.now(dt.UTC) + timedelta(hours=hours)

    wrong = S3ObjectStore(config, now=read_clock)
    for request in (
        lambda: wrong.put_bytes(prefix + "object", b"x", content_type=TYPE),
        lambda: wrong.stat(prefix + "object"),
        lambda: list(wrong.list_keys(prefix)),
    ):
        with pytest.raises(StorageUnavailableError):
            request()
    signed_at = f"X-Amz-Date={read_clock():%Y%m%dT%H}"
    assert signed_at in wrong.presign_internal_get(prefix + "object", expires=MINUTE)
    assert signed_at in wrong.presign_put(prefix + "object", expires=MINUTE)
    assert signed_at in wrong.presign_get(prefix + "object", expires=MINUTE, filename="x")


@pytest.mark.parametrize(
    ("changes", "url", "scope"),
    [
        ({}, "http://s3.example/espalier/", "us-east-1"),
        ({"region": "eu-central-1"}, "http://s3.example/espalier/", "eu-central-1"),
        ({"addressing": "virtual", "secure": True}, "https://espalier.s3.example/", "us-east-1"),
        (
            {"endpoint": "s3.eu-west-3.amazonaws.com", "secure": True},
            "https://espalier.s3.eu-west-3.amazonaws.com/",
            "eu-west-3",
        ),
        (
            {"endpoint": "s3.eu-west-3.amazonaws.com", "secure": True, "addressing": "path"},
            "https://s3.eu-west-3.amazonaws.com/espalier/",
            "eu-west-3",
        ),
        (
            {"public_endpoint": "files.example", "is_public_secure": True},
            "https://files.example/espalier/",
            "us-east-1",
        ),
    ],
)
def test_a_url_is_signed_for_the_region_and_in_the_style_of_its_host(
    changes: dict[str, Any], url: str, scope: str, prefix: str
) -> None:
    config = StorageConfig("s3.example", "key", "secret", "espalier")
    signed = S3ObjectStore(replace(config, **changes)).presign_get(f"{prefix}a", expires=MINUTE, filename="a")
    assert signed.startswith(f"{url}{prefix}a?")
    (credential,) = parse_qs(urlsplit(signed).query)["X-Amz-Credential"]
    assert credential.split("/")[2:] == [scope, "s3", "aws4_request"]
