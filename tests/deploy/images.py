"""`make check-images`: the Dockerfile linted; `control` and `worker-cpu` built from nothing, inspected, and run.

The CUDA worker needs space and a package index for its 3 GB of wheels. It is linted only.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.engine import BASE_IMAGE, ROOT, Engine, import_base
from tests.deploy.wheelhouse import TORCH, fill_wheelhouse, offered_wheels

TARGETS = ("control", "worker-cpu")
DOCKERFILES = ("Dockerfile", "tests/deploy/standins/Dockerfile")
_MIB = 2**20
# What a locked-down cluster grants: no root, no capability, no new one, nothing to write to but what is mounted.
LOCKED = (
    *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none"),
    *("--pids-limit", "256", "--tmpfs", "/tmp"),
)
_USERS = ("10001:10001", "54321:0")
_FORBIDDEN_NAMES = ("pip.conf", ".env", "secrets.json", ".git", "id_rsa", "bundle.pem", ".netrc", ".pypirc")


@dataclass(frozen=True)
class Version:
    """What `make images` labels an image with, from git."""

    version: str
    revision: str

    @classmethod
    @functools.cache
    def read(cls) -> Version:
        """Return one version for the whole check, whatever is committed meanwhile."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        revision = _git("rev-parse", "HEAD")
        return cls(f"{project['version']}-g{revision[:7]}", revision)


def check(engine: Engine) -> None:
    build_all(engine)
    for target in TARGETS:
        look_into(engine, target)
    run_control(engine)
    run_worker(engine)


def lint() -> None:
    subprocess.run([Path(sys.executable).with_name("hadolint"), *DOCKERFILES], cwd=ROOT, check=True)
    print(f"hadolint: {', '.join(DOCKERFILES)}: nothing to say")


def build_all(engine: Engine) -> None:
    """Build both images and print how long each took and how large it is."""
    with timed("base"):
        import_base(engine)
    with timed("wheels"):
        fill_wheelhouse(engine.directory / "wheels", extras=("api", "schedule", "cli", "worker", "tracing"))
    with offered_wheels(engine.directory / "wheels") as pip_conf:
        for target in TARGETS:
            with timed(target):
                build(engine, target, pip_conf=pip_conf)
    for name in (BASE_IMAGE, *map(image_name, TARGETS)):
        print(f"{name}: {size_of(engine, name) / 1e6:.0f} MB")


def image_name(target: str) -> str:
    return f"espalier-{target}:{Version.read().version}"


def build(engine: Engine, target: str, *, pip_conf: Path) -> None:
    """Build an image as a person does, by `make images`."""
    options = f"--network host --secret id=pip_conf,src={pip_conf} --build-arg TORCH_CPU={TORCH}"
    words = (f"DOCKER={engine.program}", f"TARGETS={target}", f"BUILD_OPTIONS={options}")
    done = subprocess.run(
        ["make", "images", *words], cwd=ROOT, env=engine.env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-6000:], sep="\n")
        done.check_returncode()


def size_of(engine: Engine, name: str) -> int:
    return int(engine.docker("image", "inspect", "--format", "{{.Size}}", name))


def look_into(engine: Engine, target: str) -> None:
    """Look for what belongs to this machine, or is nobody's business, in every layer that is not the base's."""
    name = image_name(target)
    history = engine.docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", name)
    foreign = _foreign_words()
    assert not [word for word in foreign if word.decode() in history], "the history names this machine"
    inspected = json.loads(engine.docker("image", "inspect", name))[0]["Config"]
    assert inspected["User"] == "10001:10001"
    assert inspected["Entrypoint"] == ["/usr/bin/tini", "--"]
    assert inspected["Labels"]["org.opencontainers.image.revision"] == Version.read().revision
    num_files = 0
    for path, content in _own_files(engine, name):
        num_files += 1
        assert Path(path).name not in _FORBIDDEN_NAMES, f"{path} is in a layer of {target}"
        found = [word for word in foreign if word in content]
        assert not found, f"{path} of {target} names this machine: {found}"
    assert num_files > 1000, "the layers were not read"
    print(f"{target}: nothing of this machine in {num_files} files and the history")


def _own_files(engine: Engine, name: str) -> Iterator[tuple[str, bytes]]:
    """Yield the files of an image's layers, without the base's, one layer at a time on disk."""
    with tempfile.TemporaryDirectory(dir=engine.directory) as place:
        archive = Path(place) / "image.tar"
        engine.docker("save", "--output", archive, name)
        base = json.loads(engine.docker("image", "inspect", BASE_IMAGE))[0]["RootFS"]["Layers"]
        layers = json.loads(engine.docker("image", "inspect", name))[0]["RootFS"]["Layers"]
        with tarfile.open(archive) as whole:
            manifest = json.load(whole.extractfile("manifest.json"))  # type: ignore[arg-type]
            assert layers[: len(base)] == base, "the image does not stand on the base"
            for member in manifest[0]["Layers"][len(base) :]:
                with tarfile.open(fileobj=whole.extractfile(member)) as layer:
                    for entry in layer:
                        if content := layer.extractfile(entry) if entry.isfile() else None:
                            yield entry.name, content.read()


def _foreign_words() -> tuple[bytes, ...]:
    """Return what tells of this machine: the checkout, the user's home, the addresses that pip is told of."""
    configured = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    told = [word for line in configured.splitlines() for word in line.partition("=")[2].strip("'\"").split()]
    places = {word.removeprefix("file://") for word in told if word.startswith(("file://", "/", "http"))}
    standard = "/etc/"  # where Debian has its own certificates, at the same path on every machine
    return tuple(word.encode() for word in {f"{ROOT}/", *places} if not word.startswith(standard))


def run_control(engine: Engine) -> None:
    """Run every entry point of the control image as a locked-down cluster would."""
    for user in _USERS:
        assert "s3-check" in run_locked(engine, "control", "espalier", "--help", user=user)
        imported = "import api.main, schedule.clock, cli.main, core.db.revisions as m; print(m.MIGRATIONS_DIR)"
        where = run_locked(engine, "control", "python", "-c", imported, user=user).strip()
        assert "0001" in run_locked(engine, "control", "ls", f"{where}/versions", user=user)
        for module in ("api", "schedule"):
            refused = try_locked(engine, "control", "python", "-m", module, user=user)
            assert refused.returncode
            assert "database_url" in refused.stderr, refused.stderr[-500:]
    packages = run_locked(engine, "control", "python", "-c", "import sys, os; print(os.listdir(sys.path[-1]))")
    assert "'fastapi'" in packages
    assert not [name for name in ("'torch'", "'transformers'", "'pip'") if name in packages]
    written = try_locked(engine, "control", "sh", "-c", "touch /opt/espalier/x /var/lib/espalier/x")
    assert "Read-only file system" in written.stderr
    print("control: runs with a read-only root, no capability, as 10001 and as any user; no torch, no pip")


def run_worker(engine: Engine) -> None:
    ask = "import torch, bitsandbytes, peft, worker.trainer.process; print(torch.__version__, torch.ones(9, 9).mm(torch.ones(9, 9)).sum().item())"
    for user in _USERS:
        cache = ("--tmpfs", "/var/lib/espalier/cache:mode=1777")
        said = run_locked(engine, "worker-cpu", "python", "-c", ask, user=user, options=cache, memory="1g")
        assert said.split() == [TORCH.partition("==")[2], "729.0"], said
        refused = try_locked(engine, "worker-cpu", "python", "-m", "worker", user=user)
        assert "database_url" in refused.stderr, refused.stderr[-500:]
    too_much = "import torch; torch.ones(2**30)"
    killed = try_locked(engine, "worker-cpu", "python", "-c", too_much, memory="512m")
    assert killed.returncode == 137, f"4 GB within 512 MB ended with {killed.returncode}"
    print(f"worker-cpu: {said.split()[0]} computes under the same walls; beyond its memory it is killed (137)")


def run_locked(
    engine: Engine, target: str, *words: str, user: str = _USERS[0], options: tuple[str, ...] = (), memory: str = "512m"
) -> str:
    done = try_locked(engine, target, *words, user=user, options=options, memory=memory)
    assert not done.returncode, f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout


def try_locked(
    engine: Engine, target: str, *words: str, user: str = _USERS[0], options: tuple[str, ...] = (), memory: str = "512m"
) -> subprocess.CompletedProcess[str]:
    walls = (*LOCKED, "--user", user, "--memory", memory, "--memory-swap", memory, *options)
    return engine.try_docker("run", "--rm", *walls, image_name(target), *words)


class timed:
    """Print how long what happens inside takes."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_error: object) -> None:
        print(f"{self._what}: {time.monotonic() - self._started:.0f} s", flush=True)


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
