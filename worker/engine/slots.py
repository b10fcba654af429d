"""A slot: one admitted job, its row of a bank, and where it stands in its data."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from core.domain.training import count_steps, order_examples
from worker.engine.banks import Bank
from worker.engine.evaluations import PendingEvaluation
from worker.engine.examples import EngineJob, Example


@dataclass(frozen=True, eq=False)
class LoraPair:
    """Views of one job's A [R, K] and B [N, R] of one linear, at the job's own rank."""

    A_RK: Tensor
    B_NR: Tensor


@dataclass
class BatchTally:
    """What the fused steps so far have summed up of the current optimizer batch."""

    position: int = 0
    loss_sum: float = 0.0
    num_right: int = 0
    num_tokens: int = 0


class Slot:
    """One admitted job. Raises torch.OutOfMemoryError when the device has no memory for its row."""

    def __init__(self, job: EngineJob, bank: Bank) -> None:
        self.job = job
        self.bank = bank
        self.step = 0
        self.num_updates = 0
        self.num_skipped_in_a_row = 0
        self.num_fused_steps = 0
        self.served_tokens = 0
        self.tally = BatchTally()
        self.evaluation: PendingEvaluation | None = None
        self.is_resting = False
        self.evicted_at: float | None = None
        self.total_steps = count_steps(job.spec, len(job.examples))
        self._order: tuple[int, list[int]] = (-1, [])
        drawn_P = self._draw_weights()
        # Last, and then one copy that takes no memory: a row is never left without its slot.
        self.bank_row = bank.add_row()
        self.weights_P.copy_(drawn_P)

    @property
    def row(self) -> int:
        return self.bank_row.index

    @property
    def weights_P(self) -> Tensor:
        return self.bank.weights_SP[self.row]

    @property
    def grads_P(self) -> Tensor:
        """The gradients of the current optimizer batch; meaningless before its first fused step."""
        return self.bank.grads_SP[self.row]

    @property
    def exp_avg_P(self) -> Tensor:
        return self.bank.exp_avg_SP[self.row]

    @property
    def exp_avg_sq_P(self) -> Tensor:
        return self.bank.exp_avg_sq_SP[self.row]

    @property
    def is_finished(self) -> bool:
        return self.step >= self.total_steps

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.job.examples) / self.job.spec.batch_size)

    @property
    def epoch(self) -> int:
        """The epoch of the current optimizer batch; 0 is the first."""
        return self.step // self.steps_per_epoch

    def batch_indices(self) -> list[int]:
        """Return the example indices of the current optimizer batch."""
        if self._order[0] != self.epoch:
            self._order = (self.epoch, order_examples(self.job.spec.seed, self.epoch, len(self.job.examples)))
        start = (self.step % self.steps_per_epoch) * self.job.spec.batch_size
        return self._order[1][start : start + self.job.spec.batch_size]

    def waiting_indices(self) -> list[int]:
        """Return those of the current batch that no fused step has taken yet; none while the slot rests."""
        has_none = self.is_finished or self.is_resting or self.evaluation is not None
        return [] if has_none else self.batch_indices()[self.tally.position :]

    def batch_examples(self) -> list[Example]:
        return [self.job.examples[index] for index in self.batch_indices()]

    def dropout_key(self, example_index: int) -> int:
        return stable_hash(self.job.spec.seed, self.epoch, example_index)

    def pairs(self) -> dict[str, LoraPair]:
        """Return the weights as matrices, by the linear's qualified name."""
        return self.view(self.weights_P)

    def view(self, numbers_P: Tensor) -> dict[str, LoraPair]:
        """Return a row's P numbers, wherever they are, as matrices, by the linear's qualified name."""
        layout, rank, pairs = self.bank.layout, self.job.spec.adapter.rank, {}
        for name, columns in layout.columns.items():
            A_RK, Bt_RN = (numbers_P[side].view(layout.padded_rank, -1) for side in columns)
            pairs[name] = LoraPair(A_RK[:rank], Bt_RN[:rank].T)
        return pairs

    @property
    def is_batch_complete(self) -> bool:
        return self.tally.position == len(self.batch_indices())

    def count(self, *, num_examples: int, num_tokens: int, loss_sum: float, num_right: float) -> None:
        """Sum up what a fused step has found of the current optimizer batch."""
        self.num_fused_steps += 1
        self.tally.position += num_examples
        self.tally.num_tokens += num_tokens
        self.tally.loss_sum += loss_sum
        self.tally.num_right += int(num_right)

    def advance(self) -> None:
        """Go on to the next optimizer batch."""
        self.step += 1
        self.restart_batch()

    def restart_batch(self) -> None:
        """Forget what has been summed of the current batch: its next fused step starts the gradients anew."""
        self.tally = BatchTally()

    def forget_moments(self) -> None:
        """Let the optimizer begin anew, as on weights that it has not seen."""
        self.exp_avg_P.zero_()
        self.exp_avg_sq_P.zero_()
        self.num_updates = 0
        self.restart_batch()

    def _draw_weights(self) -> Tensor:
        """Draw A as PEFT does (uniform of bound 1/sqrt(K)), each matrix from a seed of its own; B is zero."""
        drawn_P = torch.zeros(self.bank.layout.num_parameters)
        for name, pair in self.view(drawn_P).items():
            generator = torch.Generator().manual_seed(stable_hash(self.job.spec.seed, name))
            bound = 1 / math.sqrt(pair.A_RK.shape[1])
            drawn_RK = torch.rand(pair.A_RK.shape, generator=generator).mul_(2 * bound).sub_(bound)
            pair.A_RK.copy_(drawn_RK)
        return drawn_P


def stable_hash(*parts: object) -> int:
    """Return 63 bits that depend on the parts alone, on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
