"""What this worker has found out about the bases of its pools: which it may try to load, and why not the others.

A finding that holds for every worker is written into the base's row. If only this worker is at fault, the reason stays
among its own refusals. While a base may not be loaded, no job is claimed for it and no attempt is made.

| what a look or a load shows | the base's row | this worker's refusals |
|---|---|---|
| its files can be read | `unusable` becomes `unchecked` | those for the base's fault are forgotten |
| it is loaded | `usable` | those of its pool are forgotten |
| it is refused for a fault of its own | `unusable`, with the reason | each of its pools |
| its files can be read, but this worker cannot load it | `unusable` becomes `unchecked` | this pool |
| this worker cannot even look at it | stays | this pool |
"""

from __future__ import annotations

import datetime as dt
from contextlib import suppress

import structlog
from sqlalchemy import Engine

from core.db.models import BaseModelRow
from core.db.session import DATABASE_ERRORS, ServiceSession, service_transaction
from core.domain.bases import BaseState
from core.services.base_models import list_base_models, list_known_base_models, record_state
from core.services.turns import record_load
from core.settings import WorkerSettings
from core.storage import ObjectStore
from worker.supervisor.artifacts import publish_tokenizer
from worker.supervisor.loading import BaseUnusableError, InspectedBase
from worker.supervisor.orders import pools_of
from worker.supervisor.refusals import Refusals

log = structlog.get_logger()


class BaseFindings:
    """What the last look or load has shown of each base. Any thread may ask, and any may add a finding.

    `refusals` has the reasons why this worker does not try to load the bases of some pools at present.
    """

    def __init__(self, settings: WorkerSettings, *, name: str, engine: Engine, store: ObjectStore) -> None:
        self._pools, self._name = settings.worker_pools, name
        self._engine = engine
        self._store = store
        self.refusals = Refusals()

    def list_served(self) -> list[tuple[str, BaseModelRow]]:
        """Return this worker's pools with their bases, in the order in which its settings name them."""
        with service_transaction(self._engine) as session:
            bases = {pool: base for base in list_base_models(session) for pool in pools_of(base)}
        return [(pool, bases[pool]) for pool in self._pools if pool in bases]

    def find_loadable(self, session: ServiceSession) -> dict[str, BaseModelRow]:
        """Return the bases, by pool, that this worker may try to load. Bases no longer served are included."""
        bases = {pool: base for base in list_known_base_models(session) for pool in pools_of(base)}
        return {pool: bases[pool] for pool in self._pools if pool in bases and self.may_load(pool, bases[pool])}

    def was_refused(self, pool: str) -> bool:
        """Say whether the last try to load the base of a pool has failed, however long ago."""
        return self.refusals.find(pool) is not None

    def may_load(self, pool: str, base: BaseModelRow) -> bool:
        """Say whether a load may succeed: none has failed recently, or the base has changed since."""
        return self.refusals.is_due(pool, state_since=base.state_since)

    def accept(self, base: BaseModelRow, inspected: InspectedBase) -> None:
        """Note that a base's files can be loaded, as far as a look at them shows."""
        for pool in pools_of(base):
            self.refusals.forget_base_fault(pool)
        publish_tokenizer(self._engine, self._store, base.id, inspected.tokenizer_path)

    def refuse(self, pool: str, base: BaseModelRow, error: BaseUnusableError) -> None:
        """Note why a base cannot be loaded, and log each reason once for the operator."""
        since = None
        if not error.is_worker_fault:
            since = self.record(base, BaseState.UNUSABLE, reason=error.reason)
        refused = (pool,) if error.is_worker_fault else pools_of(base)
        is_news = [
            self.refusals.add(each, error.reason, is_worker_fault=error.is_worker_fault, state_since=since)
            for each in refused
        ]
        if any(is_news):
            log.error("base_model.refused", pool=pool, reason=error.reason, is_worker_fault=error.is_worker_fault)

    def record_usable(self, pool: str, base: BaseModelRow, *, load_seconds: float) -> bool:
        """Write into a base's row that it was loaded, and return whether the database has taken it."""
        is_recorded = self.record(base, BaseState.USABLE) is not None
        with suppress(*DATABASE_ERRORS), service_transaction(self._engine) as session:
            record_load(session, pool, seconds=load_seconds)
        return is_recorded

    def record(self, base: BaseModelRow, state: BaseState, *, reason: str | None = None) -> dt.datetime | None:
        """Write a state into a base's row. Return since when it has this state, or None if the database is away."""
        try:
            with service_transaction(self._engine) as session:
                return record_state(session, base.id, state=state, reason=reason, by=self._name)
        except DATABASE_ERRORS as error:
            log.warning("base_model.state_unrecorded", base_model=base.id, error=type(error).__name__)
            return None
