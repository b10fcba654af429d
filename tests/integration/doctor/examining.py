"""The pools that the doctor's tests use, and a way to run statements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, text

from core.db.session import service_transaction
from tests.factories.bases import BASE_MODEL

POOLS = (f"{BASE_MODEL}@none", f"{BASE_MODEL}@nf4")
Examine = Callable[..., dict[str, dict[str, Any]]]


def run(owner: Engine, *statements: str) -> None:
    with service_transaction(owner) as session:
        for statement in statements:
            session.execute(text(statement))
