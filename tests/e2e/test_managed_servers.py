"""A whole job on managed servers: TLS by a private CA, an owner that is no superuser, a distant region."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import psycopg
import pytest
import yaml
from openai import OpenAI

from cli.commands.promises import run_checks
from local.external import ExternalServers
from local.stack import LocalStack
from tests.e2e.lab import BASE_MODEL, base_entry
from tests.managed import REGION, ManagedServers, managed_servers
from tests.waiting import PATIENCE_SECONDS, wait_until

ROWS = b"\n".join(
    b'{"messages": [{"role": "user", "content": "Say %d."}, {"role": "assistant", "content": "It is %d."}]}' % (n, n)
    for n in range(12)
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("postgres_major", [15, 18])
def test_a_job_succeeds_on_servers_of_a_cloud_provider(
    postgres_major: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = tmp_path / "registry.yaml"
    registry.write_text(yaml.safe_dump({"base_models": [base_entry(tiny_base)]}))
    with managed_servers(tmp_path, postgres_major=postgres_major) as managed:
        for name, value in managed.env.items():
            monkeypatch.setenv(name, value)
        servers, env = ExternalServers(tmp_path / "data"), {"ESPALIER_TRAINER_THREADS": "1", **managed.env}
        with LocalStack(tmp_path / "data", servers=servers, registry_path=registry, env=env) as stack:
            adapter_url = _train(stack, ca_file=managed.env["ESPALIER_S3_CA_BUNDLE"])
            assert _sessions(managed, "ssl") == ["espalier_api", "espalier_schedule", "espalier_worker"]
            assert _sessions(managed, "not ssl or rolsuper or rolbypassrls") == []
            broken = [
                each for each in run_checks(stack.owner_url, stack.addresses.storage, is_deep=True) if each.num_broken
            ]
    assert broken == []
    (credential,) = parse_qs(urlsplit(adapter_url).query)["X-Amz-Credential"]
    assert f"/{REGION}/s3/" in credential


def _train(stack: LocalStack, *, ca_file: str) -> str:
    """Run a job to its success, fetch its adapter, and return the URL that it came from."""
    key = stack.create_tenant("acme")
    with OpenAI(base_url=f"{stack.api_url}/v1", api_key=key, max_retries=0) as client:
        file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=BASE_MODEL, training_file=file.id, hyperparameters={"n_epochs": 1, "batch_size": 4}
        )
        wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded", what="the end of the job")
    ask = httpx.Client(
        base_url=stack.api_url, headers={"authorization": f"Bearer {key}"}, trust_env=False, timeout=PATIENCE_SECONDS
    )
    with ask:
        (adapter,) = ask.get("/v1/adapters").json()["data"]
        files = ask.get(f"/v1/adapters/{adapter['id']}/download").json()["files"]
    for file in files:
        trusted = ssl.create_default_context(cafile=ca_file)
        content = httpx.get(file["url"], verify=trusted, trust_env=False, timeout=PATIENCE_SECONDS).content
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    return str(files[0]["url"])


def _sessions(managed: ManagedServers, condition: str) -> list[str]:
    """Return the logins of the service's sessions that a condition is true of."""
    query = f"""select distinct usename from pg_stat_activity a join pg_stat_ssl using (pid) join pg_roles r
        on r.rolname = usename where usename <> 'provider' and ({condition}) order by usename"""
    with psycopg.connect(managed.admin_url) as connection:
        return [name for (name,) in connection.execute(query)]
