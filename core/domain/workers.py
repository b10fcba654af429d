"""The facts that a worker reports at each heartbeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

WorkerState = Literal["idle", "loading", "serving", "stopping"]


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker reports about itself. It holds or loads the base of `pool`, with that base's slots.

    `name` is its identity, `given_name` its display name. Its clock is `clock_offset_seconds` ahead of the database's,
    and it claims nothing if that is too much. It has held the base for `pool_seconds`, and is about to load that of
    `next_pool`. `refusals` says, by pool, why it cannot load other bases, in words for operators.
    """

    name: str
    pools: tuple[str, ...]
    state: WorkerState
    pool: str | None = None
    slots: int = 0
    slots_in_use: int = 0
    pool_seconds: float = 0.0
    next_pool: str | None = None
    refusals: Mapping[str, str] = field(default_factory=dict)
    version: str | None = None
    given_name: str | None = None
    clock_offset_seconds: float | None = None
    is_clock_wrong: bool = False
