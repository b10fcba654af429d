"""What a job must be to be trained on this base by this worker, checked on the host before anything is packed.

One assertion on a device ends every tenant's job: nothing that could raise one gets that far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worker.engine.bases import BaseShape
from worker.engine.errors import InvalidJobError
from worker.engine.examples import EngineJob, Example


@dataclass(frozen=True)
class JobLimits:
    shape: BaseShape
    max_rank: int
    max_tokens: int

    def check_job(self, job: EngineJob) -> None:
        """Raises InvalidJobError naming what does not fit, ValueError when the share is not positive."""
        if not job.share > 0:
            raise ValueError(f"A job's share must be above 0, not {job.share}.")
        adapter = job.spec.adapter
        if adapter.rank > self.max_rank:
            raise InvalidJobError(f"Rank {adapter.rank} is above this worker's {self.max_rank}.")
        lacking = set(adapter.target_modules) - set(self.shape.target_modules)
        if lacking:
            raise InvalidJobError(
                f"The base has no {', '.join(sorted(lacking))}; it has {', '.join(self.shape.target_modules)}."
            )
        self.check_examples(job.examples)

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Raises InvalidJobError when there is none, or one has nothing to learn, is too long or not of this base."""
        if not examples:
            raise InvalidJobError("There is no example.")
        for example in examples:
            self._check_example(example)

    def _check_example(self, example: Example) -> None:
        if len(example.token_ids) != len(example.is_label) or not example.num_labels:
            raise InvalidJobError("An example has nothing to learn.")
        if example.num_tokens > self.max_tokens:
            raise InvalidJobError(
                f"An example has {example.num_tokens} tokens; this worker takes {self.max_tokens} a step."
            )
        if example.token_ids.min() < 0 or example.token_ids.max() >= self.shape.vocab_size:
            raise InvalidJobError("An example has a token id outside the base's vocabulary.")
