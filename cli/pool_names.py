"""Short names of pools for tables: without the owner's part, unless two known pools would then look alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from core.domain.errors import NotFoundError


class PoolNames:
    """The known pools, each with its short name."""

    def __init__(self, known: Iterable[str]) -> None:
        self._known = frozenset(known)
        counts = Counter(map(_without_owner, self._known))
        self._pools = {_without_owner(pool): pool for pool in self._known if counts[_without_owner(pool)] == 1}

    def shorten(self, pool: str) -> str:
        short = _without_owner(pool)
        return short if self._pools.get(short) == pool else pool

    def find(self, text: str) -> str:
        """Return the pool of this name, full or short. Raises NotFoundError."""
        if text in self._known:
            return text
        if text not in self._pools:
            raise NotFoundError(
                f"There is no pool {text[:200]!r}. `espalier pools` shows them all.", code="pool_not_found"
            )
        return self._pools[text]


def _without_owner(pool: str) -> str:
    return pool.rpartition("/")[2]
