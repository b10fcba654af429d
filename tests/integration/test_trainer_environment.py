"""The process with tenants' rows and the base has no credential, sees none, and does not outlive its supervisor."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from core import sandbox
from core.domain.values import Frozen
from local.locks import is_running
from tests.waiting import PATIENCE_SECONDS, wait_until
from worker.supervisor.children import _PRODUCT_CACHES, TrainerChild, TrainerGoneError, _child_environment

ROOT = Path(__file__).resolve().parents[2]
CREDENTIALS = {
    "ESPALIER_DATABASE_URL": "postgresql://espalier_worker:hush-1@db/espalier",
    "ESPALIER_OWNER_DATABASE_URL": "postgresql://owner:hush-2@db/espalier",
    "ESPALIER_REDIS_URL": "redis://:hush-3@redis/0",
    "ESPALIER_S3_ACCESS_KEY": "hush-4",
    "ESPALIER_S3_SECRET_KEY": "hush-5",
    "ESPALIER_WORKER_PASSWORD": "hush-6",
    "AWS_SECRET_ACCESS_KEY": "hush-7",
    "HF_TOKEN": "hush-8",
    "PGPASSFILE": "/hush-9",
    "CELERY_BROKER_URL": "amqp://user:hush-10@mq",
    "SENTRY_DSN": "https://hush-11@sentry",
    "GOOGLE_APPLICATION_CREDENTIALS": "/hush-12",
    "HTTPS_PROXY": "http://user:hush-13@proxy:3128",
    "NVIDIA_API_KEY": "hush-14",
    "HARMLESS_BY_ITS_NAME": "hush-15",
}
HUB = {
    "HF_TOKEN": "hub-token",
    "HF_ENDPOINT": "https://hub.example",
    "HTTPS_PROXY": "http://user:p%40ss@proxy:3128",
    "https_proxy": "http://user:p%40ss@proxy:3128",
    "NO_PROXY": "s3.example",
}
AUTHORITIES = {"SSL_CERT_FILE": "/ca.pem", "SSL_CERT_DIR": "/certificates", "REQUESTS_CA_BUNDLE": "/ca.pem"}
# A process that holds a secret and starts a trainer, as a worker does, and lives on.
SUPERVISOR = """
import sys, time
from core.domain.training import Frozen
from core.sandbox import hide_memory
from worker.supervisor.children import TrainerChild
hide_memory()
child = TrainerChild(Frozen(), threads=1, scratch_dir=None)
print(child.pid, flush=True)
time.sleep(1000)
"""
# What the trainer takes for torch: it tries to get at its supervisor, and writes down what it got.
HOSTILE_TORCH = """
import ctypes, json, os
parent = os.getppid()
libc = ctypes.CDLL(None, use_errno=True)
got = {}
for name in ("environ", "mem", "maps", "root/proc/self/environ"):
    try:
        with open(f"/proc/{parent}/{name}", "rb") as file:
            got[name] = name if name == "mem" else file.read().decode(errors="replace")
    except OSError as error:
        pass
PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
if libc.ptrace(PTRACE_SEIZE, parent, 0, 0) == 0:
    got["ptrace"] = "seized"
with open(os.environ["TMPDIR"] + "/got.new", "w") as out:
    json.dump(got, out)
os.rename(os.environ["TMPDIR"] + "/got.new", os.environ["TMPDIR"] + "/got")
raise SystemExit
"""
WITHOUT_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


class Nothing(Frozen):
    """No order at all: the child is looked at, not used."""


def start_trainer() -> TrainerChild:
    return TrainerChild(Nothing(), threads=1, scratch_dir=None)  # type: ignore[arg-type]


def environment_of(pid: int) -> str:
    """Return what a process was told. The kernel shows nothing of it for a moment after the process has started."""
    shown = Path(f"/proc/{pid}/environ")
    wait_until(lambda: bool(shown.read_bytes()), what="the environment of a process")
    return shown.read_bytes().decode()


def end_trainer(child: TrainerChild) -> None:
    child.close()
    with pytest.raises(TrainerGoneError):
        child.receive(timeout_seconds=PATIENCE_SECONDS)


@contextmanager
def supervisor(
    env: Mapping[str, str], *, prefix: tuple[str, ...] = (), code: str = SUPERVISOR
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a supervisor in a process of its own, and yield it with its trainer's pid."""
    argv = [*prefix, sys.executable, "-c", code]
    with subprocess.Popen(argv, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        try:
            yield process, pid
        finally:
            process.kill()
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_trainer_has_no_credential_in_its_environment_arguments_or_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with tmp_path.joinpath("secret").open("w") as secret:
        os.set_inheritable(secret.fileno(), True)
        child = start_trainer()
        try:
            environment = environment_of(child.pid)
            arguments = Path(f"/proc/{child.pid}/cmdline").read_bytes().decode()
            sockets = psutil.Process(child.pid).net_connections()
            files = [file.path for file in psutil.Process(child.pid).open_files()]
        finally:
            end_trainer(child)
    assert "hush" not in environment + arguments
    assert "CUDA_VISIBLE_DEVICES=0" in environment.split("\0")
    assert "ESPALIER_TRAINER_THREADS=1" in environment.split("\0")
    assert sockets == []
    assert secret.name not in files


def test_a_trainer_that_ends_leaves_nothing_in_its_temporary_directory(tmp_path: Path) -> None:
    environment = {**_child_environment(1, tmp_path), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "worker.trainer"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=environment)
    assert done.returncode == 3, "it has loaded its libraries, and nobody gives it an order"
    assert [path.name for path in tmp_path.iterdir()] == []


GROWS = """
import psutil, torch
from worker.engine.frozen import PackedWeight
torch.set_num_threads(1)
weights = [PackedWeight(torch.randn(n, k), None) for n in (32, 64, 96) for k in (32, 64)]
def live_through(lengths):
    for rows in lengths:
        for number, weight in enumerate(weights):
            weight.multiply(torch.zeros(1, rows, (32, 64)[number % 2]))
    return psutil.Process().memory_info().rss
with torch.no_grad():
    before = live_through(range(1, 40))
    print(live_through(range(40, 240)) - before)
"""


def test_a_trainer_keeps_few_of_the_products_that_are_compiled_for_each_length_of_a_step() -> None:
    environment = {**_child_environment(1, None), "PYTHONPATH": str(ROOT)}
    grown = [
        int(subprocess.run([sys.executable, "-c", GROWS], env=env, capture_output=True, text=True, check=True).stdout)
        for env in (environment, {**environment, **dict.fromkeys(_PRODUCT_CACHES, "1024")})
    ]
    assert grown[0] < grown[1] / 4, "as much is kept as without a bound"


@pytest.mark.parametrize(("offline", "is_told"), [("1", False), ("true", False), ("0", True)])
def test_only_a_trainer_that_may_reach_a_hub_is_told_the_token_and_the_proxies(
    monkeypatch: pytest.MonkeyPatch, offline: str, is_told: bool
) -> None:
    for name, value in {**HUB, **AUTHORITIES, "HF_HUB_OFFLINE": offline}.items():
        monkeypatch.setenv(name, value)
    child = start_trainer()
    try:
        environment = environment_of(child.pid).split("\0")
    finally:
        end_trainer(child)
    assert {f"{name}={value}" in environment for name, value in HUB.items()} == {is_told}
    assert f"HF_HUB_OFFLINE={offline}" in environment
    assert {f"{name}={value}" in environment for name, value in AUTHORITIES.items()} == {True}


@pytest.mark.parametrize("prefix", [(), WITHOUT_CAPABILITIES], ids=["with what this user may", "without capabilities"])
def test_code_within_a_trainer_gets_nothing_of_its_supervisor(prefix: tuple[str, ...], tmp_path: Path) -> None:
    if prefix and os.geteuid() != 0:
        pytest.skip("only root has capabilities to go without")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(HOSTILE_TORCH)
    env = {**CREDENTIALS, "PYTHONPATH": f"{tmp_path}:{ROOT}", "TMPDIR": str(tmp_path)}
    with supervisor(env, prefix=prefix):
        wait_until((tmp_path / "got").exists)
    assert json.loads((tmp_path / "got").read_text()) == {}


# What the trainer takes for torch: it tries to read secrets by every path it can think of, then works as trainers do.
PRYING_TORCH = """
import json, os, shutil
from pathlib import Path
scratch = Path(os.environ["TMPDIR"])
named = [Path(path) for path in os.environ["ESPALIER_HIDDEN_FILES"].split(":")]
got = []
for path in (*named, *(Path(f"/proc/self/root{path}") for path in named), *(path.resolve() for path in named)):
    try:
        got.append(path.read_text())
    except OSError:
        pass
try:
    os.link(named[0], scratch / "link")
    got.append((scratch / "link").read_text())
except OSError:
    pass
(scratch / "made").mkdir()
(scratch / "made" / "file").write_text("mine")
(scratch / "made" / "file").rename(scratch / "moved")
shutil.copy(json.__file__, scratch / "copied")
(scratch / "got.new").write_text(json.dumps([got, (scratch / "moved").read_text()]))
(scratch / "got.new").rename(scratch / "got")
raise SystemExit
"""


def test_code_within_a_trainer_cannot_read_the_files_of_its_supervisors_secrets(tmp_path: Path) -> None:
    for name in ("torch", "secrets", "secrets/..data", "scratch"):
        (tmp_path / name).mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(PRYING_TORCH)
    (tmp_path / "secrets" / "database_url").write_text("hush-1")
    (tmp_path / "secrets" / "..data" / "s3").write_text("hush-2")
    (tmp_path / "secrets" / "s3").symlink_to("..data/s3")  # as Kubernetes mounts them
    env = {
        "ESPALIER_DATABASE_URL_FILE": str(tmp_path / "secrets" / "database_url"),
        "ESPALIER_S3_SECRET_KEY_FILE": str(tmp_path / "secrets" / "s3"),
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "TMPDIR": str(tmp_path / "scratch"),
    }
    with supervisor(env):
        wait_until((tmp_path / "scratch" / "got").exists)
    got, moved = json.loads((tmp_path / "scratch" / "got").read_text())
    assert got == []
    assert moved == "mine"


def test_a_trainer_that_is_frozen_dies_with_its_supervisor() -> None:
    with supervisor({"PYTHONPATH": str(ROOT)}) as (process, pid):
        # From then on the kernel has been told; torch has not been loaded.
        wait_until(lambda: "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text())
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        process.kill()
        process.wait()
        wait_until(lambda: not is_running(pid))


def test_a_trainer_outlives_the_thread_that_asked_for_it() -> None:
    children: list[TrainerChild] = []
    asking = threading.Thread(target=lambda: children.append(start_trainer()))
    asking.start()
    asking.join()
    (child,) = children
    try:
        wait_until(lambda: "NoNewPrivs:\t1" in Path(f"/proc/{child.pid}/status").read_text())
        assert child.is_alive
    finally:
        end_trainer(child)


def test_a_trainer_that_cannot_be_started_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        start_trainer()


LEAVER = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import sandbox
sandbox.die_with_parent()
sandbox.shed_capabilities()
own = Path(sys.argv[1]) / "own"
own.mkdir()
sandbox.leave_root(own)
(own / "file").touch()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
os.system("true")
try:
    Path(sys.argv[1], "foreign").touch()
    is_confined = False
except PermissionError:
    is_confined = True
print(json.dumps([os.getuid(), os.getgroups(), int(status["CapPrm"], 16), is_confined]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs a Python that every user may run")
def test_roots_process_becomes_a_user_without_any_right_where_others_can_reach_what_it_needs() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        shutil.copy(sandbox.__file__, name)
        (Path(name) / "sandbox.py").chmod(0o644)
        argv = ["/usr/bin/python3", "-I", "-c", LEAVER, name]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd="/")
        assert json.loads(done.stdout) == [sandbox.CONFINED_USER, [], 0, True]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_roots_process_stays_where_others_cannot_reach_what_it_needs(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    code = "import os, sys; from pathlib import Path; from core.sandbox import leave_root; leave_root(Path(sys.argv[1])); print(os.getuid())"
    argv = [sys.executable, "-c", code, str(closed / "own")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == "0\n"


@pytest.mark.parametrize(
    ("line", "exit_code", "failed"),
    [(b"no order\n", 1, ["orders"]), (b'{"kind": "unheard_of"}\n', 1, ["orders"]), (b"", 3, [])],
    ids=["no json", "unknown", "the end"],
)
def test_a_trainer_that_cannot_read_an_order_ends_with_status_1_and_the_log_says_why(
    line: bytes, exit_code: int, failed: list[str]
) -> None:
    """The end of its orders is no fault: its supervisor is gone."""
    argv = [sys.executable, "-m", "worker.trainer"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            if not line:
                process.stdin.close()
            assert process.wait(PATIENCE_SECONDS) == exit_code
        finally:
            process.kill()
        told = [json.loads(each) for each in process.stderr.read().splitlines() if each.startswith(b"{")]
    assert [each["thread"] for each in told if each["event"] == "thread.failed"] == failed
