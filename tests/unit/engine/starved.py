"""Memory that runs out at a chosen allocation, and what must not change then: every other slot, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worker.engine import Engine
from worker.engine.slots import BatchTally, Slot


class MemoryRunsOut(TorchDispatchMode):
    """Within it, the n-th operator that needs new memory gets none. `has_failed` says whether there were so many.

    A copy into a matrix that is no stretch of memory counts as well: a GPU takes a buffer for what comes from its host.
    """

    def __init__(self, nth: int) -> None:
        TorchDispatchMode.__init__(self)
        self._left = nth

    @property
    def has_failed(self) -> bool:
        return self._left <= 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.has_failed:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and not args[0].is_contiguous():
            self._allocate()
        found = func(*args, **(kwargs or {}))
        if storages(found) - storages((args, kwargs)):
            self._allocate()
        return found

    def _allocate(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise torch.OutOfMemoryError("the test's device is full")


def storages(values: Any) -> set[int]:
    tensors = [each for each in tree_leaves(values) if isinstance(each, Tensor) and each.layout == torch.strided]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


@dataclass(frozen=True, eq=False)
class Standing:
    """All that a slot is, copied."""

    vectors: tuple[Tensor, ...]
    counts: tuple[int, ...]
    position: int
    tally: BatchTally
    evaluation: object

    @classmethod
    def of(cls, slot: Slot) -> Standing:
        return cls(
            tuple(
                each.clone()
                for each in (slot.row.weights_P, slot.row.grads_P, slot.row.exp_avg_P, slot.row.exp_avg_sq_P)
            ),
            (
                slot.cursor.step,
                slot.row.num_updates,
                slot.num_skipped_in_a_row,
                slot.num_fused_steps,
                slot.served_tokens,
            ),
            slot.cursor.position,
            replace(slot.tally),
            slot.evaluation,
        )

    def has_numbers_of(self, slot: Slot) -> bool:
        """Say whether weights, gradients and moments are the slot's of now, bit for bit."""
        return all(torch.equal(a, b) for a, b in zip(self.vectors, Standing.of(slot).vectors, strict=True))

    def is_that_of(self, slot: Slot) -> bool:
        now = Standing.of(slot)
        mine, its = ((each.counts, each.position, each.tally, each.evaluation) for each in (self, now))
        return mine == its and self.has_numbers_of(slot)


def put_back(engine: Engine, before: dict[str, Standing]) -> None:
    """Make every slot what it was, so that one engine can try the same step again and again."""
    for slot_name, standing in before.items():
        slot = engine._slots[slot_name]
        vectors = (slot.row.weights_P, slot.row.grads_P, slot.row.exp_avg_P, slot.row.exp_avg_sq_P)
        for vector_P, was_P in zip(vectors, standing.vectors, strict=True):
            vector_P.copy_(was_P)
        slot.cursor.step, slot.row.num_updates, *counts = standing.counts
        slot.num_skipped_in_a_row, slot.num_fused_steps, slot.served_tokens = counts
        slot.cursor.position, slot.tally = standing.position, replace(standing.tally)
    engine._budget.tokens = engine._budget.cap


def standings(engine: Engine, *, but: Sequence[str] = ()) -> dict[str, Standing]:
    return {slot_name: Standing.of(slot) for slot_name, slot in engine._slots.items() if slot_name not in but}


def assert_unmoved(engine: Engine, before: dict[str, Standing]) -> None:
    for slot_name, standing in before.items():
        assert standing.is_that_of(engine._slots[slot_name]), slot_name


def assert_every_row_has_one_slot(engine: Engine) -> None:
    """The rows of a bank are its slots', one each, and whatever is beyond them is zero."""
    banks = {slot.row.bank for slot in engine._slots.values()}
    for bank in banks:
        rows = sorted(slot.row.index for slot in engine._slots.values() if slot.row.bank is bank)
        assert rows == list(range(bank.num_rows))
        for vectors_SP in (bank.weights_SP, bank.grads_SP, bank.exp_avg_SP, bank.exp_avg_sq_SP):
            assert not vectors_SP[bank.num_rows :].any()
    assert len({bank.layout.padded_rank for bank in banks}) == len(banks)
