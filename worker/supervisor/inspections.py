"""Looks at the bases that this worker does not hold, so that one that becomes usable needs no operator's action.

A look starts a trainer that reads only the small files. It never touches the trainer that holds a base, so it runs in
parallel to the loop that serves jobs.
"""

from __future__ import annotations

import datetime as dt

from core.db.models import BaseModelRow
from core.domain.bases import BaseState
from core.settings import WorkerSettings
from worker.supervisor.bases import BaseHolder
from worker.supervisor.findings import BaseFindings
from worker.supervisor.loading import BaseUnusableError, TrainerStarter
from worker.supervisor.orders import order_base, pools_of


class BaseInspector:
    """Looks once at each state of a base in doubt, and again at refused bases when their next try is due."""

    def __init__(
        self, settings: WorkerSettings, *, starter: TrainerStarter, base: BaseHolder, findings: BaseFindings
    ) -> None:
        self._settings = settings
        self._starter = starter
        self._base = base
        self._findings = findings
        self._looked_at: dict[str, dt.datetime] = {}  # by base, the `state_since` of the state that was looked at

    def inspect_others(self) -> None:
        """Look at the bases that were never loaded or could not be loaded. Raises the database's errors."""
        # A base with several pools is looked at once, by the first of them.
        served = {base.id: (pool, base) for pool, base in reversed(self._findings.list_served())}
        for pool, base in served.values():
            is_at_hand = self._base.shown_pool in pools_of(base)
            if not is_at_hand and self._is_in_doubt(base) and self._is_due(pool, base):
                self._inspect(pool, base)

    def _is_in_doubt(self, base: BaseModelRow) -> bool:
        """Say whether a look may show something new. A worker that holds no base loads an unchecked one instead."""
        return base.state == BaseState.UNUSABLE or (base.state == BaseState.UNCHECKED and self._base.is_alive)

    def _is_due(self, pool: str, base: BaseModelRow) -> bool:
        refusal = self._findings.refusals.find(pool)
        if refusal is None:
            return self._looked_at.get(base.id) != base.state_since
        return not refusal.is_worker_fault and self._findings.may_load(pool, base)

    def _inspect(self, pool: str, base: BaseModelRow) -> None:
        try:
            inspected = self._starter.inspect(order_base(base, pool, settings=self._settings))
        except BaseUnusableError as error:
            self._findings.refuse(pool, base, error)
            return
        if inspected is None:
            return
        inspected.trainer.close()
        self._findings.accept(base, inspected)
        since = None
        if base.state == BaseState.UNUSABLE:  # its files can be read now: any worker may try to load it
            since = self._findings.record(base, BaseState.UNCHECKED)
        self._looked_at[base.id] = since or base.state_since
