"""Processes with a wrong wall clock, by libfaketime. The monotonic clock is not changed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def find_faketime() -> str:
    spec = importlib.util.find_spec("libfaketime")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("libfaketime is not installed")
    (library,) = Path(spec.submodule_search_locations[0]).rglob("libfaketime.so.1")
    return str(library)


def fake_clock(path: Path, shift: str) -> dict[str, str]:
    """Return the environment of a process whose clock is off by what `path` says, at every look: such as "-20m".

    Its children have the host's clock. A trainer is told LD_PRELOAD and no setting of libfaketime, whose own are that
    waits on the monotonic clock are faked too: some of them never end.
    """
    set_clock(path, shift)
    directory = path.with_name(f"{path.name}-site")
    directory.mkdir(exist_ok=True)
    (directory / "sitecustomize.py").write_text('import os\nos.environ.pop("LD_PRELOAD", None)\n')
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH")))),
        "LD_PRELOAD": find_faketime(),
        "FAKETIME_TIMESTAMP_FILE": str(path),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }


def set_clock(path: Path, shift: str) -> None:
    path.write_text(shift)
