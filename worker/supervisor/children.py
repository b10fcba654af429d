"""The supervisor's end of its trainer: starts the child process, sends orders, collects reports, ends it.

The child gets a few environment variables, none of them a credential. When this process ends, the child's standard
input closes and the child ends by itself. If the child is suspended or busy, the kernel kills it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from core.domain.values import Frozen
from core.sandbox import plain_environment
from core.telemetry.logs import find_log_file
from worker.messages import REPORTS, Alive, BaseLoaded, LoadBase, Report, encode_line

# The variables that configure torch, the hub's cache and TLS. No prefix here also matches somebody's keys.
_FAMILIES = ("CUDA_", "KMP_", "MALLOC_", "MKL_", "OMP_", "PYTORCH_", "TORCH_")
_NAMES = frozenset(
    {"BNB_CUDA_VERSION", "CRASHPOINT", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_VISIBLE_DEVICES", "TRITON_CACHE_DIR"}
    | {"HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"}
    | {"ESPALIER_S3_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE"}
)
# For a trainer that may use a hub: a token, and proxies, which may contain a password.
_HUB_NAMES = frozenset({"ALL_PROXY", "HF_ENDPOINT", "HF_TOKEN", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"})
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})  # what huggingface_hub takes for true
# On a CPU oneDNN compiles a matrix product for each number of rows. It keeps 1,024 compiled products of 0.4 MB each,
# and torch's bridge to it keeps as many. Every step has other numbers of rows, so a trainer grew by most of a gigabyte.
# One step needs about ten of them, each in all layers of the base. Compiling one takes no longer than getting the
# memory to keep it.
_PRODUCT_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
_KEPT_PRODUCTS = "32"
_STOP_SECONDS = 5.0


class TrainerGoneError(Exception):
    """The trainer process has ended. `exit_code` is negative for a signal."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"The trainer process ended with exit code {exit_code}.")
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.exit_code,))


class TrainerChild:
    """One trainer process, for one base model."""

    def __init__(self, order: LoadBase, *, threads: int | None, scratch_dir: Path | None) -> None:
        self._reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._alive_at = time.monotonic()
        started: Future[subprocess.Popen[bytes]] = Future()
        environment = _child_environment(threads, scratch_dir)
        threading.Thread(target=self._accompany, args=(started, environment), daemon=True, name="trainer").start()
        self._process = started.result()
        self.send(order)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def silent_seconds(self) -> float:
        """How long ago the training loop was last known to turn."""
        return time.monotonic() - self._alive_at

    def send(self, order: Frozen) -> None:
        """Send an order. If the trainer is gone, `receive` notices it, not this."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode_line(order))
            self._process.stdin.flush()
        except BrokenPipeError:
            return

    def receive(self, *, timeout_seconds: float) -> Report | None:
        """Return the next report, or None after the timeout. Raises TrainerGoneError."""
        try:
            report = self._reports.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        if report is None:
            self._reports.put(None)
            raise TrainerGoneError(self._process.wait())
        if isinstance(report, BaseLoaded | Alive):
            self._alive_at = time.monotonic()
        return report

    def close(self) -> None:
        """End the trainer: close its input, and kill it if that is not enough."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the trainer at once, from any thread. Its input stays open: another thread may be writing to it."""
        self._process.kill()
        self._process.wait()

    def _accompany(self, started: Future[subprocess.Popen[bytes]], environment: dict[str, str]) -> None:
        """Start the trainer and read its reports until it has ended. The kernel kills it when this thread ends."""
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "worker.trainer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=find_log_file(),
                env=environment,
                start_new_session=True,  # the supervisor handles a terminal's Ctrl-C
            )
        except OSError as error:
            started.set_exception(error)
            return
        started.set_result(process)
        assert process.stdout is not None
        try:
            with process.stdout as lines:
                for line in lines:
                    self._reports.put(REPORTS.validate_json(line))
        finally:
            self._reports.put(None)
        process.wait()


def _child_environment(threads: int | None, scratch_dir: Path | None) -> dict[str, str]:
    is_offline = os.environ.get("HF_HUB_OFFLINE", "1").upper() in _TRUE
    names = _NAMES if is_offline else _NAMES | _HUB_NAMES
    environment = plain_environment()
    environment |= {
        name: value for name, value in os.environ.items() if name.upper() in names or name.startswith(_FAMILIES)
    }
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment["TOKENIZERS_PARALLELISM"] = "false"
    # No code is compiled here, and importing bitsandbytes would load the compiler, which takes a quarter of a trainer's
    # start.
    environment["TORCHDYNAMO_DISABLE"] = "1"
    # Importing torch makes a directory for the compiler's cache, which is not needed. This one exists and may be
    # read-only.
    environment["TORCHINDUCTOR_CACHE_DIR"] = sys.prefix
    environment |= dict.fromkeys(_PRODUCT_CACHES, _KEPT_PRODUCTS)
    if scratch_dir is not None:
        environment["TMPDIR"] = str(scratch_dir)
    if threads is not None:
        environment["ESPALIER_TRAINER_THREADS"] = str(threads)
    return environment
