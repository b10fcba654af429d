"""The process that holds tenants' data and the base holds no credential: seen in its own environment, as the kernel has it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from core.domain.training import Frozen
from tests.waiting import PATIENCE_SECONDS
from worker.supervisor.children import TrainerChild, TrainerGoneError

CREDENTIALS = {
    "ESPALIER_DATABASE_URL": "postgresql://espalier_worker:hush-1@db/espalier",
    "ESPALIER_OWNER_DATABASE_URL": "postgresql://owner:hush-2@db/espalier",
    "ESPALIER_REDIS_URL": "redis://:hush-3@redis/0",
    "ESPALIER_S3_ACCESS_KEY": "hush-4",
    "ESPALIER_S3_SECRET_KEY": "hush-5",
    "ESPALIER_WORKER_PASSWORD": "hush-6",
    "AWS_SECRET_ACCESS_KEY": "hush-7",
    "HF_TOKEN": "hush-8",
    "PGPASSFILE": "/hush-9",
    "CELERY_BROKER_URL": "amqp://user:hush-10@mq",
    "SENTRY_DSN": "https://hush-11@sentry",
    "GOOGLE_APPLICATION_CREDENTIALS": "/hush-12",
    "HTTPS_PROXY": "http://user:hush-13@proxy:3128",
}


class Nothing(Frozen):
    """No order at all: the child is looked at, not used."""


def test_a_trainer_has_no_credential_in_its_environment_arguments_or_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    child = TrainerChild(Nothing(), threads=1, scratch_dir=None)  # type: ignore[arg-type]
    try:
        environment = Path(f"/proc/{child.pid}/environ").read_bytes().decode()
        arguments = Path(f"/proc/{child.pid}/cmdline").read_bytes().decode()
        sockets = psutil.Process(child.pid).net_connections()
    finally:
        child.close()
        with pytest.raises(TrainerGoneError):
            child.receive(timeout_seconds=PATIENCE_SECONDS)
    assert "hush" not in environment + arguments
    assert "CUDA_VISIBLE_DEVICES=0" in environment.split("\0")
    assert "ESPALIER_TRAINER_THREADS=1" in environment.split("\0")
    assert sockets == []
