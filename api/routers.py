"""Routers by the kind of caller: a tenant, whose requests are counted, or an operator."""

from __future__ import annotations

from api.dependencies import OperatorGate, RateGate
from api.routing import Router


class TenantRouter(Router):
    """Routes of a tenant. Each names the scope that a key needs: see `needs`."""

    def __init__(self, prefix: str, *, tag: str) -> None:
        super().__init__(prefix, tag=tag, doors=[RateGate()])


class OperatorRouter(Router):
    """Routes of operators. Other callers get the answer of an unknown URL."""

    def __init__(self, prefix: str, *, tag: str) -> None:
        super().__init__(prefix, tag=tag, doors=[OperatorGate()])
