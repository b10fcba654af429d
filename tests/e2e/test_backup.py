"""A backup, restored on other servers as in docs/running.md, continues where the first service was."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlsplit

import pytest
import yaml
from minio import Minio
from openai import OpenAI

from cli.commands.promises import run_checks
from core.services.registry import read_registry
from local.binaries import find_postgres
from local.servers import LocalServers, ServerAddresses
from local.stack import LocalStack, prepare_database
from tests.e2e.lab import BASE_MODEL, base_entry
from tests.waiting import wait_until

ROWS = b"\n".join(
    b'{"messages": [{"role": "user", "content": "Say %d."}, {"role": "assistant", "content": "It is %d."}]}' % (n, n)
    for n in range(12)
)


def submit(client: OpenAI) -> str:
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model=BASE_MODEL, training_file=file.id, hyperparameters={"n_epochs": 1, "batch_size": 4}
    ).id


def wait_for(client: OpenAI, job_id: str) -> None:
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "succeeded", what="the end of the job")


def postgres_tool(name: str, *arguments: str, url: str) -> None:
    parts = urlsplit(url)
    env = {**os.environ, "PGPASSWORD": parts.password or ""}
    where = f"postgresql://{parts.username}@{parts.hostname}:{parts.port}{parts.path}"
    subprocess.run([str(find_postgres() / name), *arguments, f"--dbname={where}"], env=env, check=True)


def copy_bucket(source: ServerAddresses, target: ServerAddresses) -> int:
    ours, theirs = (
        Minio(each.endpoint, each.access_key, each.secret_key, secure=False)
        for each in (source.storage, target.storage)
    )
    num_copied = 0
    for found in ours.list_objects(source.storage.bucket, recursive=True):
        answer = ours.get_object(found.bucket_name, found.object_name)
        theirs.put_object(target.storage.bucket, found.object_name, cast("BinaryIO", answer), found.size)
        answer.close()
        num_copied += 1
    return num_copied


@contextmanager
def client_of(stack: LocalStack, api_key: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stack.api_url}/v1", api_key=api_key, max_retries=0) as client:
        yield client


@pytest.mark.timeout(600)
def test_a_restored_backup_goes_on_where_the_service_was(tiny_base: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry.yaml"
    registry.write_text(yaml.safe_dump({"base_models": [base_entry(tiny_base)]}))
    env, dump = {"ESPALIER_TRAINER_THREADS": "1"}, tmp_path / "espalier.dump"
    with (
        LocalStack(tmp_path / "lost", registry_path=registry, env=env, is_durable=False) as lost,
        LocalServers(tmp_path / "new", is_durable=False) as servers,
    ):
        key = lost.create_tenant("acme")
        with client_of(lost, key) as client:
            done = submit(client)
            wait_for(client, done)
            lost.process("worker").stop()
            queued = submit(client)
            model = client.fine_tuning.jobs.retrieve(done).fine_tuned_model
        postgres_tool("pg_dump", "--format=custom", f"--file={dump}", url=lost.owner_url)
        assert copy_bucket(lost.addresses, servers.addresses) > 0
        prepare_database(servers.addresses.postgres_url, read_registry(registry), logins=())
        options = ("--clean", "--if-exists", "--exit-on-error", "--single-transaction")
        postgres_tool("pg_restore", *options, str(dump), url=servers.addresses.postgres_url)
    with LocalStack(tmp_path / "new", registry_path=registry, env=env, is_durable=False) as stack:
        with client_of(stack, key) as client:
            assert client.fine_tuning.jobs.retrieve(done).fine_tuned_model == model
            wait_for(client, queued)
        broken = [
            each for each in run_checks(stack.owner_url, stack.addresses.storage, is_deep=True) if each.num_broken
        ]
    assert broken == []
