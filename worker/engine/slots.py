"""A slot: everything of one job that lives on the device, in flat fp32 vectors, and where it stands in its data.

Weights and both moments are one vector each (P numbers), with a view per matrix: A [R, K] and B [N, R] of every target
linear. Gradients exist only between a backward and the optimizer step that consumes them: a slot holds 12 bytes per
LoRA parameter at rest, and 20 while a step's gradients are added to those of the steps before it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from core.domain.training import count_steps, order_examples
from worker.engine.bases import BaseShape
from worker.engine.examples import EngineJob, Example


@dataclass(frozen=True, eq=False)
class LoraPair:
    """Views into a flat vector: A [R, K] and B [N, R] of one linear."""

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
    """One admitted job."""

    def __init__(self, job: EngineJob, shape: BaseShape, *, index: int, device: torch.device) -> None:
        self.job = job
        self.index = index
        self.linears = {
            name: size
            for name, size in shape.linears.items()
            if name.rpartition(".")[2] in job.spec.adapter.target_modules
        }
        rank = job.spec.adapter.rank
        self.num_parameters = sum(rank * (k + n) for k, n in self.linears.values())
        self.weights_P = torch.zeros(self.num_parameters, device=device)
        self.exp_avg_P = torch.zeros_like(self.weights_P)
        self.exp_avg_sq_P = torch.zeros_like(self.weights_P)
        self.grads_P: Tensor | None = None
        self.weights = self.view(self.weights_P)
        self.step = 0
        self.num_updates = 0
        self.num_skipped_in_a_row = 0
        self.tally = BatchTally()
        self.deficit = 0.0
        self.total_steps = count_steps(job.spec, len(job.examples))
        self._order: tuple[int, list[int]] = (-1, [])
        self._initialise()

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
        """Return those of the current batch that no fused step has taken yet."""
        return [] if self.is_finished else self.batch_indices()[self.tally.position :]

    def batch_examples(self) -> list[Example]:
        return [self.job.examples[index] for index in self.batch_indices()]

    def dropout_key(self, example_index: int) -> int:
        return stable_hash(self.job.spec.seed, self.epoch, example_index)

    def view(self, flat_P: Tensor) -> dict[str, LoraPair]:
        """Return the flat vector as matrices, by the linear's qualified name."""
        rank, cursor, pairs = self.job.spec.adapter.rank, 0, {}
        for name, (k, n) in self.linears.items():
            a_end, b_end = cursor + rank * k, cursor + rank * (k + n)
            pairs[name] = LoraPair(flat_P[cursor:a_end].view(rank, k), flat_P[a_end:b_end].view(n, rank))
            cursor = b_end
        return pairs

    def add_grads(self, grads_P: Tensor) -> None:
        """Add the gradients of a fused step whose backward has succeeded."""
        self.grads_P = grads_P if self.grads_P is None else self.grads_P.add_(grads_P)

    def advance(self) -> None:
        """Go on to the next optimizer batch."""
        self.step += 1
        self.tally = BatchTally()
        self.grads_P = None

    def restart_batch(self) -> None:
        """Forget what has been summed of the current batch, as after a load."""
        self.tally = BatchTally()
        self.grads_P = None

    def forget_moments(self) -> None:
        """Let the optimizer begin anew, as on weights that it has not seen."""
        self.exp_avg_P.zero_()
        self.exp_avg_sq_P.zero_()
        self.num_updates = 0
        self.restart_batch()

    def scrub(self) -> None:
        """Overwrite everything of the job, so that no later tenant of the memory finds a trace."""
        for tensor in (self.weights_P, self.exp_avg_P, self.exp_avg_sq_P, self.grads_P):
            if tensor is not None:
                tensor.zero_()
        self.grads_P = None

    def _initialise(self) -> None:
        """Draw A as PEFT does (uniform of bound 1/sqrt(K)), each matrix from a seed of its own; B stays zero."""
        for name, pair in self.weights.items():
            generator = torch.Generator().manual_seed(stable_hash(self.job.spec.seed, name))
            bound = 1 / math.sqrt(pair.A_RK.shape[1])
            drawn_RK = torch.rand(pair.A_RK.shape, generator=generator).mul_(2 * bound).sub_(bound)
            pair.A_RK.copy_(drawn_RK)


def stable_hash(*parts: object) -> int:
    """Return 63 bits that depend on the parts alone, on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
