"""One page of a listing: keyset pagination, where the cursor is the last item's own id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    items: tuple[T, ...]
    has_more: bool

    @classmethod
    def cut(cls, rows: Sequence[T], limit: int) -> Page[T]:
        """Make a page of `limit` from rows that were asked for with one more, to see whether there is more."""
        return cls(items=tuple(rows[:limit]), has_more=len(rows) > limit)
