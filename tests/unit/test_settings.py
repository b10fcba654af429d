"""Settings from the environment and from files, and the errors for missing or wrong ones."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from pydantic import ValidationError

import core.settings
from core.settings import (
    DatabaseSettings,
    LoginSettings,
    OwnerSettings,
    S3Settings,
    SettingFileError,
    WorkerSettings,
    describe_faults,
)

URL = "postgresql://espalier_api:a-secret@db/espalier"


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "database_url"
    path.write_text(f"  {URL}\n\n")
    return path


def test_a_setting_comes_from_the_file_that_its_variable_names(
    secret_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_DATABASE_URL_FILE", str(secret_file))
    assert DatabaseSettings().database_url.get_secret_value() == URL


def test_a_list_may_come_from_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret_file: Path) -> None:
    (tmp_path / "pools").write_text('["acme/tiny@none"]\n')
    (tmp_path / "redis").write_text("redis://cache:6379/0\n")
    monkeypatch.setenv("ESPALIER_DATABASE_URL_FILE", str(secret_file))
    monkeypatch.setenv("ESPALIER_REDIS_URL_FILE", str(tmp_path / "redis"))
    for name in ("S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY"):
        monkeypatch.setenv(f"ESPALIER_{name}_FILE", str(tmp_path / "word"))
    (tmp_path / "word").write_text("word\n")
    monkeypatch.setenv("ESPALIER_WORKER_POOLS_FILE", str(tmp_path / "pools"))
    assert WorkerSettings().worker_pools == ("acme/tiny@none",)


def test_a_setting_that_is_set_twice_is_refused_by_name(secret_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_DATABASE_URL_FILE", str(secret_file))
    monkeypatch.setenv("ESPALIER_DATABASE_URL", "postgresql://other")
    with pytest.raises(SettingFileError) as raised:
        DatabaseSettings()
    assert str(raised.value) == "ESPALIER_DATABASE_URL and ESPALIER_DATABASE_URL_FILE are both set: keep one of them."


@pytest.mark.parametrize("empty", ["ESPALIER_DATABASE_URL", "ESPALIER_DATABASE_URL_FILE"])
def test_an_empty_variable_is_not_set(empty: str, secret_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_DATABASE_URL", URL)
    monkeypatch.setenv("ESPALIER_DATABASE_URL_FILE", str(secret_file))
    monkeypatch.setenv(empty, "")
    assert DatabaseSettings().database_url.get_secret_value() == URL


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file"), (b"\xff", "not UTF-8"), (b"\n", "empty")], ids=str
)
def test_a_file_that_cannot_be_used_is_named_with_its_variable(
    content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "url").write_bytes(content)
    monkeypatch.setenv("ESPALIER_DATABASE_URL_FILE", str(tmp_path / "url"))
    with pytest.raises(SettingFileError, match=rf"ESPALIER_DATABASE_URL_FILE names {tmp_path}/url.*{reason}"):
        DatabaseSettings()


def test_a_missing_setting_is_told_without_the_others_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_S3_ENDPOINT", "s3.example")
    monkeypatch.setenv("ESPALIER_S3_SECRET_KEY", "do-not-show")
    with pytest.raises(ValidationError) as raised:
        S3Settings()
    assert "do-not-show" not in str(raised.value)
    assert describe_faults(raised.value) == (
        "ESPALIER_S3_SECRET_KEY (Value error, ESPALIER_S3_ACCESS_KEY and ESPALIER_S3_SECRET_KEY are set together, "
        "or neither is.)"
    )


def refusal_of(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as raised:
        S3Settings()
    return describe_faults(raised.value)


@pytest.mark.parametrize(
    ("endpoint", "secure", "url"),
    [
        ("10.0.0.1:9000", None, "http://10.0.0.1:9000"),
        ("s3.example", "true", "https://s3.example"),
        ("http://minio:9000/", None, "http://minio:9000"),
        ("https://s3.eu-central-1.amazonaws.com", None, "https://s3.eu-central-1.amazonaws.com"),
        ("https://s3.example", "true", "https://s3.example"),
        ("[::1]:9000", None, "http://[::1]:9000"),
        ("HTTPS://s3.example:65535//", None, "https://s3.example:65535"),
        ("https://s3-accelerate.amazonaws.com", None, "https://s3-accelerate.amazonaws.com"),
        (
            "https://bucket.vpce-1a2b.s3.eu-west-1.vpce.amazonaws.com",
            None,
            "https://bucket.vpce-1a2b.s3.eu-west-1.vpce.amazonaws.com",
        ),
    ],
)
def test_an_endpoint_is_a_url_or_a_host(
    endpoint: str, secure: str | None, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_S3_ENDPOINT", endpoint)
    if secure is not None:
        monkeypatch.setenv("ESPALIER_S3_SECURE", secure)
    assert S3Settings().storage_config.url == url


def test_the_public_endpoint_has_a_scheme_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_S3_ENDPOINT", "http://minio:9000")
    monkeypatch.setenv("ESPALIER_S3_PUBLIC_ENDPOINT", "https://files.example:8443")
    config = S3Settings().storage_config
    assert (config.secure, config.public_endpoint, config.is_public_secure) == (False, "files.example:8443", True)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ESPALIER_S3_ENDPOINT": "https://s3.example/bucket"}, "ESPALIER_S3_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "ftp://s3.example"}, "ESPALIER_S3_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "https://key:hush@s3.example"}, "ESPALIER_S3_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "https://key:hush/ret@s3.example"}, "ESPALIER_S3_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "https://key:hush@\u2100.example"}, "ESPALIER_S3_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "host:abc"}, "ESPALIER_S3_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "127.0.0.1:99999"}, "ESPALIER_S3_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "http://127.0.0.1:0"}, "ESPALIER_S3_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "host:"}, "ESPALIER_S3_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "http://[::1"}, "ESPALIER_S3_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "http://[:::]:9000"}, "ESPALIER_S3_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "https://bucket.s3.eu-west-1.amazonaws.com"}, "ESPALIER_S3_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "https://bucket.s3.amazonaws.com"}, "ESPALIER_S3_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "s3", "ESPALIER_S3_PUBLIC_ENDPOINT": "host:abc"}, "ESPALIER_S3_PUBLIC_ENDPOINT"),
        ({"ESPALIER_S3_ENDPOINT": "https://s3.example", "ESPALIER_S3_SECURE": "false"}, "ESPALIER_S3_SECURE"),
        ({"ESPALIER_S3_ENDPOINT": "s3", "ESPALIER_S3_ACCESS_KEY": "key"}, "ESPALIER_S3_SECRET_KEY"),
        ({"ESPALIER_S3_ENDPOINT": "s3", "ESPALIER_S3_CA_BUNDLE": "/no/such.pem"}, "ESPALIER_S3_CA_BUNDLE"),
        ({"ESPALIER_S3_ENDPOINT": "s3", "ESPALIER_S3_REGION": "EU central"}, "ESPALIER_S3_REGION"),
    ],
)
def test_a_setting_of_the_store_that_cannot_be_is_refused_by_name(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal_of(monkeypatch, **variables)
    assert said.startswith(f"{named} (")
    assert "hush" not in said


@pytest.mark.parametrize(
    "name",
    ["a", "ab", "my..bucket", "my.-bucket", "my-.bucket", "-mine", "mine-", "Mine", "my_bucket", "10.0.0.1", "x" * 64],
)
def test_what_s3_takes_for_no_bucket_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal_of(monkeypatch, ESPALIER_S3_ENDPOINT="s3", ESPALIER_S3_BUCKET=name)
    assert said.startswith("ESPALIER_S3_BUCKET (Value error, A bucket's name has 3 to 63")


@pytest.mark.parametrize("name", ["abc", "my.bucket-2", "1st", "x" * 63])
def test_what_s3_takes_for_a_bucket_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_S3_ENDPOINT", "s3")
    monkeypatch.setenv("ESPALIER_S3_BUCKET", name)
    assert S3Settings().storage_config.bucket == name


@pytest.mark.parametrize("region", ["eu-west-1", "us-gov-west-1"])
def test_the_old_spelling_of_awss_hosts_is_answered_with_the_new_one(
    region: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client would look for s3-eu-west-1.us-east-1.amazonaws.com."""
    said = refusal_of(monkeypatch, ESPALIER_S3_ENDPOINT=f"https://s3-{region}.amazonaws.com")
    assert f"s3.{region}.amazonaws.com" in said


def test_the_owners_url_and_the_roles_passwords_come_from_files_too(
    secret_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert OwnerSettings().owner_url is None
    monkeypatch.setenv("ESPALIER_OWNER_DATABASE_URL_FILE", str(secret_file))
    monkeypatch.setenv("ESPALIER_API_PASSWORD_FILE", str(secret_file))
    monkeypatch.setenv("ESPALIER_WORKER_PASSWORD", "w")
    monkeypatch.setenv("ESPALIER_SCHEDULE_PASSWORD", "")
    assert OwnerSettings().owner_url == URL
    assert LoginSettings().passwords == {"espalier_api": URL, "espalier_worker": "w"}


def test_no_setting_reads_as_the_file_of_another() -> None:
    classes = [each for _, each in inspect.getmembers(core.settings, inspect.isclass) if hasattr(each, "model_fields")]
    names = {name for each in classes for name in each.model_fields}
    assert "database_url" in names
    assert not {name for name in names if name.removesuffix("_file") in names - {name}}
