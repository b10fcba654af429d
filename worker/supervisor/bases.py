"""The base a worker holds: the trainer child that has loaded it, from its start to its end.

At most one base is held at a time. One thread loads, sends, receives and closes; any thread may look at bases that are
not held, ask what is held, and kill the trainer. What is found out about a base stands in its row, for everybody, and
where only this worker is at fault, among its refusals: no job is claimed, and no attempt made, for a base not held.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
from contextlib import suppress

import structlog
from sqlalchemy import Engine

from core.db.models import BaseModelRow
from core.db.session import DATABASE_ERRORS, service_transaction
from core.domain.bases import BaseState
from core.domain.values import Frozen
from core.services.base_models import list_base_models, record_state
from core.services.turns import record_load
from core.settings import WorkerSettings
from core.storage import ObjectStore
from worker.messages import DeviceFigures, Report
from worker.supervisor.artifacts import publish_tokenizer
from worker.supervisor.children import TrainerChild, TrainerGoneError
from worker.supervisor.loading import BaseUnusableError, InspectedBase, TrainerStarter
from worker.supervisor.metrics import BASE_LOAD_SECONDS, count_steps
from worker.supervisor.orders import order_base, pools_of
from worker.supervisor.refusals import Refusals

log = structlog.get_logger()


class BaseHolder:
    """Holds the base of one pool. `stop_requested` ends every wait."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        name: str,
        engine: Engine,
        store: ObjectStore,
        stop_requested: threading.Event,
    ) -> None:
        self._settings, self._name = settings, name
        self._engine = engine
        self._store = store
        self._stop_requested = stop_requested
        self._starter = TrainerStarter(
            threads=settings.trainer_threads,
            scratch_dir=settings.scratch_dir,
            patience_seconds=settings.trainer_start_seconds,
            stop_requested=stop_requested,
        )
        self._refusals = Refusals()
        self._looked_at: dict[str, dt.datetime] = {}
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
        """The pool whose base was loaded last, whether its trainer still lives or not."""
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
        """Whether there is a trainer, as far as has been noticed."""
        return self._trainer is not None

    @property
    def is_alive(self) -> bool:
        trainer = self._trainer
        return trainer is not None and trainer.is_alive

    @property
    def figures(self) -> DeviceFigures | None:
        """What the trainer last said of the device; None where there is no trainer."""
        return self._figures if self.is_alive else None

    @property
    def silent_seconds(self) -> float:
        """How long ago the training loop was last known to turn; 0 where there is none."""
        trainer = self._trainer
        return trainer.silent_seconds if trainer is not None else 0.0

    @property
    def refusals(self) -> dict[str, str]:
        """Why this worker does not try to load the bases of some pools just now, by pool."""
        return self._refusals.standing

    def was_refused(self, pool: str) -> bool:
        """Say whether the last try to load the base of a pool has failed, however long ago."""
        return self._refusals.find(pool) is not None

    def may_load(self, pool: str, base: BaseModelRow) -> bool:
        """Say whether a try may succeed: none has failed lately, or the base has changed since."""
        return self._refusals.is_due(pool, state_since=base.state_since)

    def load(self, pool: str, base: BaseModelRow) -> None:
        """Hold the base of a pool. What is held now stays where the new one is refused at a first look."""
        self._loading, began_at = pool, time.monotonic()
        try:
            inspected = self._starter.inspect(order_base(base, pool, settings=self._settings))
            if inspected is not None:
                self._hold(pool, base, inspected, began_at=began_at)
        except BaseUnusableError as error:
            self._refuse(pool, base, error)
        finally:
            self._loading = None

    def warm(self) -> None:
        """Hold the base of this worker's first pool that can be loaded, unless one is held."""
        self._hear_idle_trainer()
        for pool, base in () if self.is_alive else self._served():
            if self.may_load(pool, base) and not self._stop_requested.is_set():
                self.load(pool, base)
                if self.is_alive:
                    return

    def inspect_others(self) -> None:
        """Look at the bases that nobody has loaded or could load, without a hand on the one that is held."""
        if self._is_state_owed:
            self._record_usable()
        served = {base.id: (pool, base) for pool, base in reversed(self._served())}  # each by its first pool
        for pool, base in served.values():
            is_at_hand = self.shown_pool in pools_of(base)
            if not is_at_hand and self._is_in_doubt(base) and self._is_look_due(pool, base):
                self._inspect(pool, base)

    def send(self, order: Frozen) -> None:
        """Send the trainer an order. Where there is none, nobody waits for it."""
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
        """End the trainer at once, from whatever thread."""
        trainer = self._trainer
        if trainer is not None:
            trainer.kill()

    def close(self) -> None:
        """End the trainer and hold nothing."""
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = self._figures = None

    def _hear_idle_trainer(self) -> None:
        """Take what an idle trainer says: while there is no work nobody else does, and it would pile up."""
        try:
            while self._trainer is not None and self.receive(timeout_seconds=0) is not None:
                pass
        except TrainerGoneError:
            self.close()

    def _note_figures(self, figures: DeviceFigures) -> None:
        assert self._pool is not None
        count_steps(self._pool, figures)
        self._figures = figures

    def _hold(self, pool: str, base: BaseModelRow, inspected: InspectedBase, *, began_at: float) -> None:
        self.close()
        self._trainer, self._pool, self._base = inspected.trainer, pool, base
        log.info("trainer.started", pool=pool, trainer_pid=inspected.trainer.pid)
        loaded = None
        try:
            loaded = self._starter.load_weights(inspected.trainer)
        except BaseUnusableError as error:
            if error.is_worker_fault and base.state == BaseState.UNUSABLE:  # its files are well now
                self._record(base, BaseState.UNCHECKED)
            raise
        finally:
            if loaded is None:
                self._trainer = None  # it was ended
        if loaded is not None:
            log.info("base_model.loaded", pool=pool, seconds=round(loaded.seconds, 2))
            self._held_since = time.monotonic()
            self._load_seconds = self._held_since - began_at
            BASE_LOAD_SECONDS.labels(pool).observe(self._load_seconds)
            self._refusals.forget(pool)
            self._accept(base, inspected)
            self._record_usable()

    def _inspect(self, pool: str, base: BaseModelRow) -> None:
        try:
            inspected = self._starter.inspect(order_base(base, pool, settings=self._settings))
        except BaseUnusableError as error:
            self._refuse(pool, base, error)
            return
        if inspected is None:
            return
        inspected.trainer.close()
        self._accept(base, inspected)
        since = None
        if base.state == BaseState.UNUSABLE:  # whoever needs it may try
            since = self._record(base, BaseState.UNCHECKED)
        self._looked_at[base.id] = since or base.state_since

    def _accept(self, base: BaseModelRow, inspected: InspectedBase) -> None:
        for pool in pools_of(base):
            self._refusals.forget_base_fault(pool)
        publish_tokenizer(self._engine, self._store, base.id, inspected.tokenizer_path)

    def _refuse(self, pool: str, base: BaseModelRow, error: BaseUnusableError) -> None:
        """Note why a base cannot be loaded, and say so to the operator, once for each reason."""
        since = None
        if not error.is_worker_fault:
            since = self._record(base, BaseState.UNUSABLE, reason=error.reason)
        refused = (pool,) if error.is_worker_fault else pools_of(base)
        is_news = [
            self._refusals.add(each, error.reason, is_worker_fault=error.is_worker_fault, state_since=since)
            for each in refused
        ]
        if any(is_news):
            log.error("base_model.refused", pool=pool, reason=error.reason, is_worker_fault=error.is_worker_fault)

    def _record_usable(self) -> None:
        assert self._base is not None
        assert self._pool is not None
        self._is_state_owed = self._record(self._base, BaseState.USABLE) is None
        with suppress(*DATABASE_ERRORS), service_transaction(self._engine) as session:
            record_load(session, self._pool, seconds=self._load_seconds)

    def _record(self, base: BaseModelRow, state: BaseState, *, reason: str | None = None) -> dt.datetime | None:
        """Say in a base's row what was found, and return since when it says so; None where the database is away."""
        try:
            with service_transaction(self._engine) as session:
                return record_state(session, base.id, state=state, reason=reason, by=self._name)
        except DATABASE_ERRORS as error:
            log.warning("base_model.state_unrecorded", base_model=base.id, error=type(error).__name__)
            return None

    def _served(self) -> list[tuple[str, BaseModelRow]]:
        """Return this worker's pools with their bases, in the order in which its settings name them."""
        with service_transaction(self._engine) as session:
            bases = {pool: base for base in list_base_models(session) for pool in pools_of(base)}
        return [(pool, bases[pool]) for pool in self._settings.worker_pools if pool in bases]

    def _is_in_doubt(self, base: BaseModelRow) -> bool:
        """Say whether a look may tell something new: one that is unchecked is loaded rather, where nothing is held."""
        return base.state == BaseState.UNUSABLE or (base.state == BaseState.UNCHECKED and self.is_alive)

    def _is_look_due(self, pool: str, base: BaseModelRow) -> bool:
        refusal = self._refusals.find(pool)
        if refusal is None:
            return self._looked_at.get(base.id) != base.state_since
        return not refusal.is_worker_fault and self.may_load(pool, base)
