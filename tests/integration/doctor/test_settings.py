"""Settings that are missing, unreadable or not URLs are found, and their values are not shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.doctor.examining import Examine


def test_settings_that_are_missing_are_named_and_hide_no_other_check(examine: Examine) -> None:
    found = examine(ESPALIER_S3_ACCESS_KEY=None, ESPALIER_REDIS_URL=None)
    assert "ESPALIER_S3_ACCESS_KEY" in found["storage"]["says"]
    assert "ESPALIER_REDIS_URL" in found["redis"]["says"]
    assert found["schema"]["state"] == "ok"


def test_settings_that_are_not_there_are_skipped_with_what_to_set(examine: Examine, env: dict[str, str]) -> None:
    found = examine(**dict.fromkeys(env))
    absent = {check: found[check] for check in ("database", "redis", "storage")}
    assert {each["state"] for each in absent.values()} == {"skipped"}
    told = ("ESPALIER_OWNER_DATABASE_URL", "ESPALIER_REDIS_URL", "ESPALIER_S3_ENDPOINT")
    assert all(name in each["remedy"] for name, each in zip(told, absent.values(), strict=True))
    assert examine("--job", **dict.fromkeys(env))["job"]["state"] == "failed"


def test_settings_of_which_a_part_is_there_have_failed(examine: Examine) -> None:
    assert examine(ESPALIER_S3_ACCESS_KEY=None)["storage"]["state"] == "failed"


def test_settings_may_be_files_as_containers_have_them(examine: Examine, env: dict[str, str], tmp_path: Path) -> None:
    found = examine(**as_files(env, tmp_path))
    looked_at = ("database", "schema", "operator", "redis", "storage put", "storage link", "storage delete")
    assert {found[check]["state"] for check in looked_at} == {"ok"}
    assert found == examine() | {"database": found["database"]}  # which counts connections


@pytest.mark.parametrize(
    ("variable", "check"),
    [
        ("ESPALIER_OWNER_DATABASE_URL", "database"),
        ("ESPALIER_REDIS_URL", "redis"),
        ("ESPALIER_S3_ACCESS_KEY", "storage"),
        ("ESPALIER_S3_SECRET_KEY", "storage"),
    ],
)
@pytest.mark.parametrize("content", [None, b"\xff", b""], ids=["not there", "not text", "empty"])
def test_a_file_of_a_setting_that_cannot_be_read_has_failed_and_hides_no_other_check(
    examine: Examine, env: dict[str, str], tmp_path: Path, variable: str, check: str, content: bytes | None
) -> None:
    changes = as_files(env, tmp_path)
    path = tmp_path / f"{variable}_FILE"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    # The URL of another role does not stand in for an owner's that is wrong.
    found = examine(**changes, ESPALIER_DATABASE_URL=env["ESPALIER_OWNER_DATABASE_URL"])
    assert (found[check]["state"], f"{variable}_FILE names {path}" in found[check]["says"]) == ("failed", True), found
    others = {"database", "redis", "storage put"} - {check, f"{check} put"}
    assert {found[each]["state"] for each in others} == {"ok"}


def as_files(env: dict[str, str], directory: Path) -> dict[str, str | None]:
    """Return the changes by which the secrets among settings come from files."""
    changes: dict[str, str | None] = {}
    for name in [name for name in env if name.endswith(("_URL", "_KEY"))]:
        path = directory / f"{name}_FILE"
        path.write_text(f"{env[name]}\n", encoding="utf-8")
        changes |= {name: None, path.name: str(path)}
    return changes


@pytest.mark.parametrize("variable", ["ESPALIER_OWNER_DATABASE_URL", "ESPALIER_DATABASE_URL"])
@pytest.mark.parametrize("url", ["postgresql://u:hush@host:port/name", "no url at all"])
def test_what_is_no_url_is_found_and_not_shown(examine: Examine, variable: str, url: str) -> None:
    found = examine(**{"ESPALIER_OWNER_DATABASE_URL": None, variable: url})["database"]
    assert found["state"] == "failed"
    assert f"{variable} (Value error, This is no URL of a database." in found["says"]
    assert "hush" not in str(found)


@pytest.mark.parametrize("url", ["redis://:hush/ret@host:6379/0", "redis://user:hush#x@host", "redis://host/hush"])
def test_what_is_no_url_of_a_redis_is_found_and_not_shown(examine: Examine, url: str) -> None:
    found = examine(ESPALIER_REDIS_URL=url)["redis"]
    assert found["state"] == "failed"
    assert "ESPALIER_REDIS_URL (Value error, This is no URL of a Redis." in found["says"]
    assert "hush" not in str(found)
