"""A tiny base for all end-to-end tests, one lab, and one plain stack for each module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from local.servers import LocalServers
from local.stack import LocalStack
from tests.e2e.lab import Lab, base_entry, running_lab
from tests.e2e.rollout import Rollout, Service
from tests.factories.tiny_bases import write_tiny_base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def the_lab(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(tiny_base, tmp_path_factory.mktemp("lab")) as made:
        yield made


@pytest.fixture
def lab(the_lab: Lab) -> Iterator[Lab]:
    yield the_lab
    the_lab.cancel_all()


@pytest.fixture(scope="module")
def stack(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """The service as `espalier up` runs it, with a short lease."""
    directory = tmp_path_factory.mktemp("stack")
    registry = directory / "registry.yaml"
    registry.write_text(yaml.safe_dump({"base_models": [base_entry(tiny_base) | {"quantizations": ["nf4"]}]}))
    env = {
        "ESPALIER_LEASE_SECONDS": "10",
        "ESPALIER_HEARTBEAT_SECONDS": "0.5",
        "ESPALIER_REAP_INTERVAL_SECONDS": "0.5",
        "ESPALIER_TRAINER_THREADS": "1",
    }
    with LocalStack(directory / "data", registry_path=registry, env=env, is_durable=False) as made:
        yield made


@pytest.fixture
def registry(tiny_base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "registry.yaml"
    path.write_text(yaml.safe_dump({"base_models": [base_entry(tiny_base)]}))
    return path


@pytest.fixture
def rollout(tmp_path: Path) -> Iterator[Rollout]:
    with LocalServers(tmp_path / "servers", is_durable=False) as servers, Service() as service:
        made = Rollout(servers, service, tmp_path)
        try:
            yield made
        finally:
            made.stop()
