"""`espalier up` uses external servers, leaves them running, and names the setting that is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import psycopg
import pytest

from local.external import ExternalServers, ExternalServersError
from local.locks import find_launcher, is_running
from local.servers import LocalServers, ServerAddresses
from tests.integration.stack.running import BASE_MODEL, espalier, fail_up, list_models, run_up
from tests.processes import storage_settings


def external_settings(addresses: ServerAddresses) -> dict[str, str]:
    return {
        "ESPALIER_OWNER_DATABASE_URL": addresses.postgres_url,
        "ESPALIER_REDIS_URL": addresses.redis_url,
        **storage_settings(addresses.storage),
    }


def test_external_servers_are_used_and_left_running(registry: Path, tmp_path: Path) -> None:
    # Servers of its own: the runtime roles, which get new passwords here, are the whole server's.
    with LocalServers(tmp_path / "servers", is_durable=False) as servers:
        env = external_settings(servers.addresses)
        with run_up(tmp_path / "data", registry, "--external", env=env) as running:
            assert set(running.state.pids) == {"api", "worker", "schedule"}
            assert list_models(running.state.api_url, running.api_key).is_success
            made = espalier("tenants", "create", "acme", env=env).stdout.strip()
            assert list_models(running.state.api_url, made).is_success
            password = servers.secrets.postgres.encode()
            if os.geteuid() == 0:  # the processes hide their environment from everybody else
                for pid in running.state.pids.values():
                    assert password not in Path(f"/proc/{pid}/environ").read_bytes()
            everything = running.everything()
            assert espalier("down", "--data-dir", running.data_dir).exit_code == 0
            assert not any(map(is_running, everything))
        assert set(servers.pids) == {"s3", "redis", "postgres"}
        assert all(map(is_running, servers.pids.values()))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ESPALIER_OWNER_DATABASE_URL": ""}, "Set ESPALIER_OWNER_DATABASE_URL"),
        ({"ESPALIER_OWNER_DATABASE_URL": "postgresql://postgres:wrong@{postgres}"}, "ESPALIER_OWNER_DATABASE_URL"),
        ({"ESPALIER_REDIS_URL": "redis://:wrong@{redis}"}, "ESPALIER_REDIS_URL"),
        ({"ESPALIER_S3_SECRET_KEY": "wrong"}, "ESPALIER_S3_ENDPOINT and its keys"),
    ],
)
def test_a_wrong_setting_of_an_external_server_is_named(
    change: dict[str, str], told: str, servers: ServerAddresses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "postgres": servers.postgres_url.rpartition("@")[2],
        "redis": servers.redis_url.rpartition("@")[2],
    }
    for name, value in (external_settings(servers) | change).items():
        monkeypatch.setenv(name, value.format(**places))
    with pytest.raises(ExternalServersError, match=told):
        ExternalServers(tmp_path).start()
    assert find_launcher(tmp_path) is None


def test_settings_that_are_missing_are_named_and_the_others_are_not_shown(registry: Path, tmp_path: Path) -> None:
    env = {"ESPALIER_OWNER_DATABASE_URL": "postgresql://x", "ESPALIER_REDIS_URL": "redis://x"}
    env["ESPALIER_S3_SECRET_KEY"] = "hush-hush"
    told = fail_up("--external", "--data-dir", tmp_path, "--registry", registry, env=env)
    assert "ESPALIER_S3_ENDPOINT" in told
    assert "ESPALIER_S3_ACCESS_KEY" in told
    assert "hush-hush" not in told


def test_migrate_prepares_a_database_and_lets_only_the_named_roles_in(registry: Path, tmp_path: Path) -> None:
    with LocalServers(tmp_path, is_durable=False) as servers:
        url = servers.addresses.postgres_url
        env = {"ESPALIER_OWNER_DATABASE_URL": url, "ESPALIER_API_PASSWORD": "api-password"}
        for _ in range(2):
            assert espalier("migrate", "--registry", registry, env=env).exit_code == 0
        place = url.rpartition("@")[2]
        with psycopg.connect(f"postgresql://espalier_api:api-password@{place}") as connection:
            assert connection.execute("select id from base_models").fetchall() == []  # it is nobody's tenant
        with psycopg.connect(url) as connection:
            assert connection.execute("select id from base_models").fetchall() == [(BASE_MODEL,)]
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"postgresql://espalier_worker:api-password@{place}")
