"""A private container engine for the checks, with its own socket, data, bridge and plugins.

It starts only as root on a machine with Debian's packages. Elsewhere `NoEngineError` says why in one line, and a check
runs only its offline part. It makes no firewall rules and no default bridge, so it leaves none behind. It is stopped by
its own process id. `CONTAINER_ENGINE_DIR` keeps its data, including what was built, between runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.packages import NotInstalledError, ensure_programs

ROOT = Path(__file__).resolve().parents[2]
BASE_IMAGE = "debian:bookworm-slim"
_PROGRAMS = ("dockerd", "mmdebstrap", "iptables")
_PACKAGES = ("docker.io", "iptables", "mmdebstrap")
_PLUGINS = ("docker-compose",)
_START_SECONDS = 90.0
_STOP_SECONDS = 60.0
# As the published slim image is made, so that sizes can be compared.
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_TRIXIE = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main\n"


class NoEngineError(Exception):
    """No engine can start here; the message says why."""


class Engine:
    """A running engine, and its command line. Every call is printed where it fails."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.program = _find_client()
        self.env = {
            **os.environ,
            "DOCKER_HOST": f"unix://{directory}/docker.sock",
            "DOCKER_CONFIG": str(directory / "config"),
            "DOCKER_BUILDKIT": "1",
            "BUILDKIT_PROGRESS": "plain",
        }

    def docker(self, *words: str | Path, env: Mapping[str, str] | None = None, stdin: str | None = None) -> str:
        """Run a command of the client and return its standard output. Raises CalledProcessError."""
        done = self.try_docker(*words, env=env, stdin=stdin)
        if done.returncode:
            said = done.stdout[-6000:] + done.stderr[-6000:]
            print(f"docker {' '.join(map(str, words))} ended with {done.returncode}:\n{said}")
            done.check_returncode()
        return done.stdout

    def try_docker(
        self, *words: str | Path, env: Mapping[str, str] | None = None, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As `docker`, for commands that may fail."""
        argv = [self.program, *map(str, words)]
        whole = self.env | dict(env or {})
        return subprocess.run(argv, env=whole, input=stdin, capture_output=True, text=True, check=False)

    def has_image(self, name: str) -> bool:
        return not self.try_docker("image", "inspect", name).returncode


@contextmanager
def running_engine() -> Iterator[Engine]:
    """Start an engine, and stop it with everything it runs. Raises NoEngineError."""
    if os.geteuid() != 0 or sys.platform != "linux":
        raise NoEngineError("it takes root on Linux")
    try:
        ensure_programs(_PROGRAMS, packages=_PACKAGES)
    except NotInstalledError as error:
        raise NoEngineError(str(error)) from error
    kept = os.environ.get("CONTAINER_ENGINE_DIR")
    directory = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="espalier-engine-"))
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = Engine(directory)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stopped, it leaves nothing behind
    daemon = _start(engine)
    try:
        yield engine
    finally:
        _stop(engine, daemon)
        if not kept:
            shutil.rmtree(directory, ignore_errors=True)


def import_base(engine: Engine) -> None:
    """Make the base image that the Dockerfile names, from Debian's packages: no registry is asked."""
    if engine.has_image(BASE_IMAGE):
        return
    archive = engine.directory / "base.tar"
    options = [f"--dpkgopt=path-exclude={path}" for path in _LEFT_OUT]
    _run("mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates", *options, "bookworm", str(archive))
    engine.docker("import", "--change", 'CMD ["bash"]', archive, BASE_IMAGE)
    archive.unlink()


def add_plugins(engine: Engine) -> None:
    """Bring compose (2.26): bookworm has none, and trixie's runs on bookworm's libraries."""
    plugins = engine.directory / "config" / "cli-plugins"
    if all((plugins / name).exists() for name in _PLUGINS):
        return
    plugins.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=engine.directory) as name:
        work = Path(name)
        (work / "sources.list").write_text(_TRIXIE, encoding="utf-8")
        (work / "lists/partial").mkdir(parents=True)
        places = {"Etc::sourcelist": "sources.list", "State::lists": "lists", "Cache": "cache"}
        options = [word for key, path in places.items() for word in ("-o", f"Dir::{key}={work / path}")]
        options += ["-o", "Dir::Etc::sourceparts=-", "-o", "APT::Sandbox::User=root"]
        _run("apt-get", "--quiet", *options, "update", cwd=work)
        _run("apt-get", "--quiet", *options, "download", *_PLUGINS, cwd=work)
        for package in work.glob("*.deb"):
            _run("dpkg", "-x", str(package), str(work / "unpacked"))
        for found in work.glob("unpacked/usr/**/cli-plugins/*"):
            shutil.copy2(found, plugins / found.name)


def _find_client() -> str:
    """Return the client of the package, which fits its daemon; another one on the path may be too new for it."""
    packaged = Path("/usr/bin/docker")
    return str(packaged) if packaged.exists() else "docker"


def _start(engine: Engine) -> subprocess.Popen[bytes]:
    at = engine.directory
    (at / "pid").unlink(missing_ok=True)
    argv = ["dockerd", "--host", f"unix://{at}/docker.sock", "--data-root", f"{at}/data", "--exec-root", f"{at}/exec"]
    # No default bridge, no rules, no forwarding: networks of compose need none, and nothing is left on the machine.
    argv += ["--pidfile", f"{at}/pid", "--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"]
    argv += ["--default-ulimit", "nofile=1024:1024"]  # a container may not raise its own where rlimits are fixed
    with (at / "dockerd.log").open("ab") as log:
        daemon = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + _START_SECONDS
    while engine.try_docker("info").returncode:
        if daemon.poll() is not None or time.monotonic() > deadline:
            _stop(engine, daemon)
            raise NoEngineError(f"dockerd does not start: {_last_line(at / 'dockerd.log')}")
        time.sleep(0.5)
    return daemon


def _stop(engine: Engine, daemon: subprocess.Popen[bytes]) -> None:
    if daemon.poll() is None:
        _remove_containers(engine)
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    for mount in _mounts_below(engine.directory):
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)


def _remove_containers(engine: Engine) -> None:
    if ids := engine.try_docker("ps", "--all", "--quiet").stdout.split():
        engine.try_docker("rm", "--force", "--volumes", *ids)
    engine.try_docker("network", "prune", "--force")


def _mounts_below(directory: Path) -> Sequence[str]:
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    return sorted((line.split()[1] for line in lines if line.split()[1].startswith(f"{directory}/")), reverse=True)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "it says nothing"


def _run(*argv: str, cwd: Path | None = None) -> None:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-2000:])
        raise subprocess.CalledProcessError(done.returncode, argv)
