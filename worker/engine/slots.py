"""A slot: one admitted job, which is its adapter's row of a bank and its cursor in the data.

The two halves are independent: the row does not use the source of the examples, and the cursor does not use the row.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.engine.banks import Bank
from worker.engine.cursors import DatasetCursor
from worker.engine.evaluations import PendingEvaluation
from worker.engine.examples import DrawnExample, EngineJob
from worker.engine.objectives import Objective
from worker.engine.objectives.supervised import CrossEntropy
from worker.engine.rows import AdapterRow


@dataclass
class BatchTally:
    """The sums over the fused steps of the current optimizer batch so far."""

    loss_sum: float = 0.0
    num_right: int = 0
    num_tokens: int = 0


class Slot:
    """One admitted job. Raises torch.OutOfMemoryError when the device has no memory for its row."""

    def __init__(self, job: EngineJob, bank: Bank) -> None:
        self.job = job
        self.cursor = DatasetCursor(job.spec, job.examples)
        self.objective: Objective = CrossEntropy()
        # From here on the slot owns memory of the device; the lines above take none.
        self.row = AdapterRow(bank, job.spec.adapter, seed=job.spec.seed)
        self.tally = BatchTally()
        self.num_skipped_in_a_row = 0
        self.num_fused_steps = 0
        self.served_tokens = 0
        self.evaluation: PendingEvaluation | None = None
        self.is_resting = False
        self.evicted_at: float | None = None

    @property
    def num_units(self) -> int:
        """The units of the current optimizer batch, over which its loss is a mean."""
        return self.objective.count_units([drawn.example for drawn in self.cursor.batch()])

    def waiting(self) -> list[DrawnExample]:
        """Return the examples that the next fused step may take; none while the slot rests or is evaluated."""
        return [] if self.is_resting or self.evaluation is not None else self.cursor.waiting()

    def count(self, *, num_examples: int, num_tokens: int, loss_sum: float, num_right: float) -> None:
        """Add a fused step's results to the current optimizer batch."""
        self.num_fused_steps += 1
        self.cursor.position += num_examples
        self.tally.num_tokens += num_tokens
        self.tally.loss_sum += loss_sum
        self.tally.num_right += int(num_right)

    def advance(self) -> None:
        """Start the next optimizer batch."""
        self.cursor.advance()
        self.tally = BatchTally()

    def restart_batch(self) -> None:
        """Discard the sums of the current batch. Its next fused step starts the gradients anew."""
        self.cursor.position = 0
        self.tally = BatchTally()
