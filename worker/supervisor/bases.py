"""The base a worker holds: the trainer child that has loaded it, from its start to its end.

At most one base is held at a time. One thread loads, sends, receives and closes; any thread may ask what is held, and
may kill the trainer.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import structlog
from sqlalchemy import Engine

from core.db.models import BaseModelRow
from core.domain.training import Frozen
from core.settings import WorkerSettings
from core.storage import ObjectStore
from worker.messages import BaseLoaded, BaseRefused, Report
from worker.supervisor.artifacts import publish_tokenizer
from worker.supervisor.children import TrainerChild, TrainerGoneError
from worker.supervisor.failures import explain_exit
from worker.supervisor.orders import order_base

log = structlog.get_logger()
_POLL_SECONDS = 0.1
_RELOAD_SECONDS = 5.0  # before a base whose trainer died while loading it is loaded again


class BaseHolder:
    """Holds the base of one pool. `stop_requested` ends every wait."""

    def __init__(
        self, settings: WorkerSettings, *, engine: Engine, store: ObjectStore, stop_requested: threading.Event
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._store = store
        self._stop_requested = stop_requested
        self._trainer: TrainerChild | None = None
        self._is_loading = False
        self._pool: str | None = None
        self._slots = 0

    @property
    def pool(self) -> str | None:
        """The pool whose base was loaded last, whether its trainer still lives or not."""
        return self._pool

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def is_loading(self) -> bool:
        return self._is_loading

    @property
    def is_held(self) -> bool:
        """Whether there is a trainer, as far as has been noticed."""
        return self._trainer is not None

    @property
    def is_alive(self) -> bool:
        trainer = self._trainer
        return trainer is not None and trainer.is_alive

    @property
    def silent_seconds(self) -> float:
        """How long ago the training loop was last known to turn; 0 where there is none."""
        trainer = self._trainer
        return trainer.silent_seconds if trainer is not None else 0.0

    def load(self, pool: str, base: BaseModelRow) -> str | None:
        """Hold the base of a pool instead of what is held now. Returns why the trainer refuses it, if it does."""
        self.close()
        self._pool, self._slots = pool, base.slots
        order = order_base(base, pool, settings=self._settings)
        self._trainer = TrainerChild(
            order, threads=self._settings.trainer_threads, scratch_dir=self._settings.scratch_dir
        )
        log.info("trainer.started", pool=pool, trainer_pid=self._trainer.pid)
        try:
            report = self._await_base(self._trainer)
        except TrainerGoneError as error:
            log.error("trainer.lost", code=explain_exit(error.exit_code).code, num_jobs=0)  # noqa: TRY400 (its log tells)
            self.close()
            self._stop_requested.wait(_RELOAD_SECONDS)
            return None
        if isinstance(report, BaseLoaded):
            log.info("base_model.loaded", pool=pool, seconds=round(report.seconds, 2))
            publish_tokenizer(self._engine, self._store, base.id, Path(report.tokenizer_path))
            return None
        self.kill()
        self.close()
        if isinstance(report, BaseRefused):
            log.error("base_model.refused", pool=pool, reason=report.message)
            return report.message
        return None

    def send(self, order: Frozen) -> None:
        """Send the trainer an order. Where there is none, nobody waits for it."""
        if self._trainer is not None:
            self._trainer.send(order)

    def receive(self, *, timeout_seconds: float) -> Report | None:
        """Return the trainer's next report, or None after the timeout. Raises TrainerGoneError."""
        if self._trainer is None:
            time.sleep(timeout_seconds)
            return None
        return self._trainer.receive(timeout_seconds=timeout_seconds)

    def kill(self) -> None:
        """End the trainer at once, from whatever thread."""
        trainer = self._trainer
        if trainer is not None:
            trainer.kill()

    def close(self) -> None:
        """End the trainer and hold nothing."""
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None

    def _await_base(self, trainer: TrainerChild) -> Report | None:
        """Wait for the base; None when it takes too long or the worker is to stop. Raises TrainerGoneError."""
        deadline = time.monotonic() + self._settings.trainer_start_seconds
        report, self._is_loading = None, True
        try:
            while report is None and time.monotonic() < deadline and not self._stop_requested.is_set():
                report = trainer.receive(timeout_seconds=_POLL_SECONDS)
        finally:
            self._is_loading = False
        return report
