"""The version of the service: the package's version, and the commit that it was built from, if that is known."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path

from core.settings import BuildSettings

_ROOT = Path(__file__).resolve().parents[1]
_SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Version:
    package: str
    commit: str | None

    def __str__(self) -> str:
        return f"{self.package}+{self.commit}" if self.commit else self.package


def read_version() -> Version:
    """Return the version of this process. An image names its commit in ESPALIER_COMMIT; in a checkout git is asked."""
    commit = BuildSettings().commit or _commit_of_checkout()
    return Version(package=installed_version("espalier"), commit=commit[:_SHOWN_DIGITS] or None)


def _commit_of_checkout() -> str:
    if not (_ROOT / ".git").exists():
        return ""
    try:
        asked = ("git", "-C", str(_ROOT), "rev-parse", "HEAD")
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # there is no git, or the checkout belongs to another user
        return ""
