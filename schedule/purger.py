"""Deletes the objects of what is over, tenant by tenant, until nothing is due. Safe to run twice at once.

No transaction is open during requests to the object store. A row is marked only after its objects are deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

import structlog
from sqlalchemy import Engine

from core.db.session import ServiceSession, service_transaction
from core.domain.duties import Duty
from core.domain.objects import is_location_of
from core.services.purges import Purge, find_purges, mark_purged
from core.services.set_asides import set_aside, setting_aside
from core.storage import ObjectStore, StorageError
from schedule.patience import Patience

log = structlog.get_logger()


def purge(engine: Engine, store: ObjectStore, *, may_go_on: Callable[[ServiceSession], bool]) -> int:
    """Purge what is due and return the number of rows. `may_go_on` is asked before each tenant's turn.

    Raises DATABASE_ERRORS, and StorageError when the object store seems to be away.
    """
    num_purged, patience = 0, Patience()
    while due := _find_due(engine, may_go_on):
        for _, turn in groupby(due, key=lambda each: each.tenant_id):
            with service_transaction(engine) as session:
                if not may_go_on(session):
                    return num_purged
            num_purged += _take_turn(engine, store, turn, patience)
    return num_purged


def _find_due(engine: Engine, may_go_on: Callable[[ServiceSession], bool]) -> tuple[Purge, ...]:
    with service_transaction(engine) as session:
        return find_purges(session) if may_go_on(session) else ()


def _take_turn(engine: Engine, store: ObjectStore, turn: Iterable[Purge], patience: Patience) -> int:
    """Purge some of one tenant's rows. A row that fails is set aside and delays neither others nor the next turn."""
    outcomes = [(each, _delete(store, each)) for each in turn]
    num_purged = 0
    with service_transaction(engine) as session:
        for each, error in outcomes:
            if error is not None:
                set_aside(session, Duty.PURGE, row_id=each.row_id, tenant_id=each.tenant_id, error=error)
                continue
            with setting_aside(session, Duty.PURGE, row_id=each.row_id, tenant_id=each.tenant_id) as marking:
                mark_purged(session, each)
            num_purged += marking.is_done
    log.info("objects.purged", tenant_id=str(outcomes[0][0].tenant_id), num_rows=num_purged)
    for _, error in outcomes:
        patience.heed(error)
    return num_purged


def _delete(store: ObjectStore, due: Purge) -> StorageError | ValueError | None:
    """Delete a row's objects, and return the error that prevented it, if any."""
    if not is_location_of(due.tenant_id, due.location):
        return ValueError(f"{due.location[:100]!r} is nothing of this tenant's that could be deleted.")
    try:
        (store.delete_prefix if due.location.endswith("/") else store.delete)(due.location)
    except (StorageError, ValueError) as error:
        return error
    return None
