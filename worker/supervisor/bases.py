"""The base that this worker holds, in the trainer child that loads it, from its start to its end.

At most one base is held at a time, and it stays loaded between jobs. One thread loads, sends, receives and closes. Any
thread may ask what is held, and kill the trainer.
"""

from __future__ import annotations

import threading
import time

import structlog

from core.db.models import BaseModelRow
from core.domain.bases import BaseState
from core.domain.values import Frozen
from core.settings import WorkerSettings
from worker.messages import DeviceFigures, Report
from worker.supervisor.children import TrainerChild, TrainerGoneError
from worker.supervisor.findings import BaseFindings
from worker.supervisor.loading import BaseUnusableError, InspectedBase, TrainerStarter
from worker.supervisor.metrics import BASE_LOAD_SECONDS, count_steps
from worker.supervisor.orders import order_base

log = structlog.get_logger()


class BaseHolder:
    """Holds the base of one pool, and its one trainer. `stop_requested` ends every wait."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        starter: TrainerStarter,
        findings: BaseFindings,
        stop_requested: threading.Event,
    ) -> None:
        self._settings = settings
        self._starter = starter
        self._findings = findings
        self._stop_requested = stop_requested
        self._trainer: TrainerChild | None = None
        self._base: BaseModelRow | None = None
        self._pool: str | None = None
        self._loading: str | None = None
        self._is_state_owed = False
        self._held_since = time.monotonic()
        self._load_seconds = 0.0
        self._figures: DeviceFigures | None = None

    @property
    def pool(self) -> str | None:
        """The pool whose base was loaded last, whether its trainer is still alive or not."""
        return self._pool

    @property
    def shown_pool(self) -> str | None:
        """The pool whose base is being loaded, or is held."""
        return self._loading or (self._pool if self.is_alive else None)

    @property
    def slots(self) -> int:
        return self._base.slots if self._base is not None else 0

    @property
    def held_seconds(self) -> float:
        """How long the base has been held."""
        return time.monotonic() - self._held_since

    @property
    def load_seconds(self) -> float:
        """How long it took to load the base that is held."""
        return self._load_seconds

    @property
    def is_loading(self) -> bool:
        return self._loading is not None

    @property
    def is_held(self) -> bool:
        """Whether there is a trainer, as far as this process has noticed."""
        return self._trainer is not None

    @property
    def is_alive(self) -> bool:
        trainer = self._trainer
        return trainer is not None and trainer.is_alive

    @property
    def is_stalled(self) -> bool:
        """Whether there is a trainer whose loop has not turned for too long, as far as this process has noticed."""
        trainer = self._trainer
        return trainer is not None and trainer.silent_seconds > self._settings.stall_seconds

    @property
    def figures(self) -> DeviceFigures | None:
        """What the trainer last reported of the device; None where there is no trainer."""
        return self._figures if self.is_alive else None

    def load(self, pool: str, base: BaseModelRow) -> None:
        """Hold the base of a pool. If a first look at its files refuses it, the present base stays."""
        self._loading, began_at = pool, time.monotonic()
        try:
            inspected = self._starter.inspect(order_base(base, pool, settings=self._settings))
            if inspected is not None:
                self._switch(pool, base, inspected, began_at=began_at)
        except BaseUnusableError as error:
            self._findings.refuse(pool, base, error)
        finally:
            self._loading = None

    def warm(self) -> None:
        """Hold the base of this worker's first pool that can be loaded, unless one is held."""
        self._hear_idle_trainer()
        for pool, base in () if self.is_alive else self._findings.list_served():
            if self._findings.may_load(pool, base) and not self._stop_requested.is_set():
                self.load(pool, base)
                if self.is_alive:
                    return

    def record_owed_state(self) -> None:
        """Record that the base was loaded, if the database was away then. Any thread may call this."""
        if self._is_state_owed:
            self._record_usable()

    def send(self, order: Frozen) -> None:
        """Send the trainer an order. Does nothing if there is no trainer."""
        if self._trainer is not None:
            self._trainer.send(order)

    def receive(self, *, timeout_seconds: float) -> Report | None:
        """Return the trainer's next report, or None after the timeout. Raises TrainerGoneError."""
        if self._trainer is None:
            time.sleep(timeout_seconds)
            return None
        report = self._trainer.receive(timeout_seconds=timeout_seconds)
        if isinstance(report, DeviceFigures):
            self._note_figures(report)
        return report

    def kill(self) -> None:
        """End the trainer at once, from any thread."""
        trainer = self._trainer
        if trainer is not None:
            trainer.kill()

    def close(self) -> None:
        """End the trainer and hold nothing."""
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = self._figures = None

    def _hear_idle_trainer(self) -> None:
        """Read the reports of an idle trainer. Without jobs no loop reads them, and they would fill the pipe."""
        try:
            while self._trainer is not None and self.receive(timeout_seconds=0) is not None:
                pass
        except TrainerGoneError:
            self.close()

    def _note_figures(self, figures: DeviceFigures) -> None:
        assert self._pool is not None
        count_steps(self._pool, figures)
        self._figures = figures

    def _switch(self, pool: str, base: BaseModelRow, inspected: InspectedBase, *, began_at: float) -> None:
        """Replace the present base by one that was inspected. There is memory for one of them only."""
        self.close()
        # From here on it counts as held, so that `kill` and `close` reach the trainer while it loads.
        self._trainer, self._pool, self._base = inspected.trainer, pool, base
        log.info("trainer.started", pool=pool, trainer_pid=inspected.trainer.pid)
        loaded = None
        try:
            loaded = self._starter.load_weights(inspected.trainer)
        except BaseUnusableError as error:
            if error.is_worker_fault and base.state == BaseState.UNUSABLE:  # its files can be read
                self._findings.record(base, BaseState.UNCHECKED)
            raise
        finally:
            if loaded is None:
                self._trainer = None  # the starter has already ended it
        if loaded is not None:
            log.info("base_model.loaded", pool=pool, seconds=round(loaded.seconds, 2))
            self._held_since = time.monotonic()
            self._load_seconds = self._held_since - began_at
            BASE_LOAD_SECONDS.labels(pool).observe(self._load_seconds)
            self._findings.refusals.forget(pool)
            self._findings.accept(base, inspected)
            self._record_usable()

    def _record_usable(self) -> None:
        assert self._base is not None
        assert self._pool is not None
        is_recorded = self._findings.record_usable(self._pool, self._base, load_seconds=self._load_seconds)
        self._is_state_owed = not is_recorded
