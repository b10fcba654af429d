"""The commands of `espalier` as an operator types them, and a running `espalier up`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from typer.testing import CliRunner, Result

from cli.main import app
from local.stack import StackState
from tests.waiting import PATIENCE_SECONDS, wait_until

ROOT = Path(__file__).resolve().parents[3]
ESPALIER = (sys.executable, "-c", "from cli.main import app; app()")
BASE_MODEL = "acme-labs/tiny-base"
SETTINGS = "ESPALIER_"


@dataclass(frozen=True)
class Up:
    """A running `espalier up`: its process, and where what it says is kept."""

    process: subprocess.Popen[bytes]
    data_dir: Path
    said_path: Path

    @property
    def said(self) -> str:
        return self.said_path.read_text()

    @property
    def state(self) -> StackState:
        return StackState.read(self.data_dir)

    @property
    def api_key(self) -> str:
        (found,) = re.findall(r"esp_\S+", self.said)
        return str(found)

    def everything(self) -> list[int]:
        """The pids of the launcher and of all that runs below it."""
        return [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))]


@contextmanager
def run_up(
    data_dir: Path,
    registry: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> Iterator[Up]:
    argv = [*prefix, *ESPALIER, "up", "--data-dir", str(data_dir), "--registry", str(registry), "--port", "0", *options]
    said_path = data_dir.with_suffix(".said")
    with said_path.open("wb") as out, subprocess.Popen(argv, env=clean(env), stdout=out, stderr=out) as process:
        try:
            wait_until(lambda: "is up" in said_path.read_text() or process.poll() is not None, what="the stack")
            assert process.poll() is None, said_path.read_text()
            yield Up(process, data_dir.resolve(), said_path)
        finally:
            process.terminate()


def clean(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this environment without settings of ours, plus `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    return {**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **(extra or {})}


def espalier(*words: str | Path, env: Mapping[str, str] | None = None) -> Result:
    """Run a command that ends by itself, in this process: what `up` changes in a process, such as signals, it does not."""
    assert words[0] != "up"
    unset = dict.fromkeys(name for name in os.environ if name.startswith(SETTINGS))
    return CliRunner().invoke(app, [str(word) for word in words], env={**unset, **(env or {})}, catch_exceptions=False)


def fail_up(*words: str | Path, env: Mapping[str, str] | None = None) -> str:
    """Run an `up` that is to refuse, and return what it says."""
    argv = [*ESPALIER, "up", "--port", "0", *map(str, words)]
    done = subprocess.run(argv, env=clean(env), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1  # a traceback has more
    return done.stderr


def list_models(api_url: str, api_key: str) -> httpx.Response:
    return httpx.get(
        f"{api_url}/v1/models",
        headers={"Authorization": f"Bearer {api_key}"},
        trust_env=False,
        timeout=PATIENCE_SECONDS,
    )


def status_of(up: Up) -> str:
    return espalier("status", "--data-dir", up.data_dir).stdout
