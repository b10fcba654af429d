"""Wheels for builds without a package index: downloaded with this machine's pip, offered over loopback, then removed.

So an image contains nothing of this machine's access to an index: its builder sees only one address of 127.0.0.1.
"""

from __future__ import annotations

import functools
import http.server
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.engine import ROOT

# What builds our own package, and what redis takes on Debian's Python (3.11.2) though not on a newer one.
_UNNAMED = ("setuptools==81.0.0", "wheel", "async-timeout==5.0.1")
TORCH = "torch==2.13.0+cpu"


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_words: object) -> None:
        """Say nothing."""


def fill_wheelhouse(directory: Path, *, extras: Sequence[str]) -> None:
    """Download what the extras need, torch for a CPU among it; nothing where all of it is there."""
    pins = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt"))
    filled = directory / "filled"
    if filled.exists() and filled.read_text(encoding="utf-8") == pins:
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])}
    download(directory, *_UNNAMED, options=("--no-deps",))
    download(directory, *sorted(named - {"torch"}), *([TORCH] if "torch" in named else []))
    filled.write_text(pins, encoding="utf-8")


def download(directory: Path, *requirements: str, options: Sequence[str] = ()) -> None:
    """Download wheels in the pinned versions."""
    directory.mkdir(parents=True, exist_ok=True)
    constraints = ("--constraint", str(ROOT / "constraints.txt"), "--only-binary", ":all:")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(directory), *constraints, *options]
    done = subprocess.run([*pip, *requirements], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-3000:])
        done.check_returncode()


@contextmanager
def offered_wheels(directory: Path) -> Iterator[Path]:
    """Serve the wheels, and yield a pip.conf that names nothing else."""
    handler = functools.partial(_Handler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = directory.parent / "pip.conf"
        lines = ("[global]", "no-index = true", f"find-links = http://127.0.0.1:{server.server_port}/")
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        try:
            yield config
        finally:
            server.shutdown()
