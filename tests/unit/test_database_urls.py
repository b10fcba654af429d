"""URLs of databases are read as people write them, and errors never quote them."""

from __future__ import annotations

from typing import Any

import pytest

from core.database_urls import read_url, with_login

LOGIN = {"user": "owner", "password": "p@s/s%"}


@pytest.mark.parametrize(
    ("url", "parameters"),
    [
        ("postgresql://owner:p%40s%2Fs%25@db:5432/name", {**LOGIN, "host": "db", "port": "5432", "dbname": "name"}),
        ("postgres://owner:p%40s%2Fs%25@db/name", {**LOGIN, "host": "db", "dbname": "name"}),
        ("postgresql+psycopg://owner:p%40s%2Fs%25@db/name", {**LOGIN, "host": "db", "dbname": "name"}),
        ("postgresql://owner:p#s?@db/name", {"user": "owner", "password": "p#s?", "host": "db", "dbname": "name"}),
        ("postgresql://owner@[::1]:5433/name", {"user": "owner", "host": "::1", "port": "5433", "dbname": "name"}),
        ("postgresql://owner@db/na%40me", {"user": "owner", "host": "db", "dbname": "na@me"}),
        ("postgresql:///name?host=/run/postgres", {"host": "/run/postgres", "dbname": "name"}),
        (
            "postgres://owner@db/name?sslmode=verify-full&sslrootcert=/etc/a%20b.pem&connect_timeout=3",
            {"user": "owner", "host": "db", "dbname": "name"}
            | {"sslmode": "verify-full", "sslrootcert": "/etc/a b.pem", "connect_timeout": "3"},
        ),
        (
            "postgresql://owner@a:5432,b:5433/name",
            {"user": "owner", "host": "a,b", "port": "5432,5433", "dbname": "name"}
            | {"target_session_attrs": "read-write"},
        ),
        (
            "postgresql://owner@a,b/name?target_session_attrs=any",
            {"user": "owner", "host": "a,b", "port": ",", "dbname": "name", "target_session_attrs": "any"},
        ),
        (
            "postgresql://owner@db/name?options=-c%20statement_timeout%3D5s",
            {"user": "owner", "host": "db", "dbname": "name", "options": "-c statement_timeout=5s"},
        ),
    ],
)
def test_what_libpq_can_say_is_understood(url: str, parameters: dict[str, Any]) -> None:
    address = read_url(url)
    assert dict(address.parameters) == parameters
    assert not address.is_pooled


@pytest.mark.parametrize(("pooler", "is_pooled"), [("transaction", True), ("session", False)])
def test_a_pooler_is_named_in_the_url_and_not_to_the_server(pooler: str, is_pooled: bool) -> None:
    address = read_url(f"postgresql://owner@db/name?sslmode=require&pooler={pooler}")
    assert address.is_pooled is is_pooled
    assert set(address.parameters) == {"user", "host", "dbname", "sslmode"}


@pytest.mark.parametrize(
    "url",
    [
        "",
        "no url",
        "host=db user=owner",
        "mysql://owner:hush@db/name",
        "postgresql://owner:hush%@db/name",
        "postgresql://owner:hush/hush@db/name",
        "postgresql://owner:hush@hush@db:5432/name",
        "postgresql://owner:12/hush@db/name",
        "postgresql://owner:12/hush@db:5432/name?sslmode=require",
        "postgresql://owner:hush@db:port/name",
        "postgresql://owner:hush@db/name?sslmod=require",
        "postgresql://owner:hush@db/name?pooler=hush",
    ],
)
def test_what_is_no_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="URL") as refused:
        read_url(url)
    assert "hush" not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(
    "url",
    [
        "postgres://owner:pass@a:1,b:2/name?sslmode=verify-full&sslrootcert=/ca%20file.pem",
        "postgresql:///name?host=/run/postgres&user=owner&password=pass",
        "postgresql://owner:p#s?@[::1]:5433/name",
    ],
)
def test_another_login_reaches_the_same_database(url: str) -> None:
    ours, theirs = (
        read_url(url).parameters,
        read_url(with_login(url, user="espalier_api", password="p@s/s%")).parameters,
    )
    assert theirs == {**ours, "user": "espalier_api", "password": "p@s/s%"}
