"""One running stack for the tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.integration.stack.running import BASE_MODEL, Up, run_up


@pytest.fixture(scope="package")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry whose base cannot be loaded: no job is submitted here."""
    source = {"kind": "path", "location": "/nowhere"}
    entry = {"id": BASE_MODEL, "source": source, "target_modules": ["q_proj"], "max_seq_len": 256}
    path = tmp_path_factory.mktemp("registry") / "registry.yaml"
    path.write_text(yaml.safe_dump({"base_models": [entry | {"quantizations": ["nf4"]}]}))
    return path


@pytest.fixture(scope="package")
def up(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with run_up(tmp_path_factory.mktemp("stack") / "data", registry) as running:
        yield running
