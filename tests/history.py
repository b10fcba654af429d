"""Trees of earlier commits, from which upgrades start."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def unpack(commit: str, directory: Path) -> Path:
    """Return the tree of a commit, written to a directory. Fails in a clone without a past, which proves nothing."""
    made = subprocess.run(["git", "archive", commit], cwd=HERE, capture_output=True, check=False)
    assert made.returncode == 0, (
        f"The commit {commit} is not here: {made.stderr.decode().strip()}. Fetch the history (git fetch --unshallow)."
    )
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
        archive.extractall(directory, filter="data")
    return directory
