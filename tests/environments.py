"""Other people's programs that tests run, each in an environment of its own: what they need is nothing that we need.

`python -m tests.environments` makes them all, once; a test makes what is not there yet.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parents[1] / ".venv-clients"
OPENAI_VERSIONS = ("1.109.1", "2.24.0", "3.54.0")
SCHEMATHESIS = "schemathesis==4.32.5"


def find_program(requirement: str, name: str) -> Path:
    """Return a program of an environment that holds one package, pinned, with what it needs."""
    DIRECTORY.mkdir(exist_ok=True)
    directory = DIRECTORY / requirement.replace("==", "-")
    with (DIRECTORY / f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may want it, too
        if not (directory / "installed").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(directory)], check=True)
            pip = [sys.executable, "-m", "pip", "--python", str(directory / "bin/python"), "--quiet"]
            subprocess.run([*pip, "--disable-pip-version-check", "install", requirement], check=True)
            (directory / "installed").touch()
    return directory / "bin" / name


def find_client_python(version: str) -> Path:
    """Return the Python that imports one version of OpenAI's client."""
    return find_program(f"openai=={version}", "python")


def find_schemathesis() -> Path:
    return find_program(SCHEMATHESIS, "schemathesis")


if __name__ == "__main__":
    find_schemathesis()
    for each in OPENAI_VERSIONS:
        find_client_python(each)
