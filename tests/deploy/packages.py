"""Debian's packages for the checks. They are installed only as root in a container or on a CI machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


class NotInstalledError(Exception):
    """The packages are not here and are not installed; the message says why in one line."""


def ensure_programs(programs: tuple[str, ...], *, packages: tuple[str, ...]) -> None:
    """Install the packages unless all the programs are on the path. Raises NotInstalledError.

    A package of a server starts that server where systemd runs, on a person's own machine as a rule.
    """
    if all(map(shutil.which, programs)):
        return
    wanted = f"apt-get install {' '.join(packages)}"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NotInstalledError(f"not here: {_missing(programs)}; on Debian, as root: {wanted}")
    if Path("/run/systemd/system").exists():
        raise NotInstalledError(f"not here: {_missing(programs)}; {wanted} would start services, so it is left to you")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (("update",), ("install", "--yes", "--no-install-recommends", *packages)):
        done = subprocess.run(("apt-get", "--quiet", *words), env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr[-2000:])
            raise NotInstalledError(f"apt-get {words[0]} failed")


def _missing(programs: tuple[str, ...]) -> str:
    return ", ".join(name for name in programs if not shutil.which(name))
