"""What a job must fulfil to be trained on this base by this worker, checked on the host before anything is packed.

A failed assertion on a device, such as an index out of range, ends every tenant's job. These checks keep every input
that could cause one from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from worker.engine.bases import BaseShape
from worker.engine.errors import InvalidExampleError, InvalidJobError
from worker.engine.examples import EngineJob, Example

# Examples are checked in parts of this size. One by one would take ten times as long, and all tenants' steps would
# wait.
_EXAMPLES_A_PART = 256


@dataclass(frozen=True)
class JobLimits:
    shape: BaseShape
    max_rank: int
    max_tokens: int

    def check_terms(self, job: EngineJob) -> None:
        """Check all but the examples.

        Raises InvalidJobError naming what does not fit, ValueError when the share is not positive.
        """
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

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Check that there are examples, and that each has a label, fits a step and has only tokens of this base.

        Raises InvalidJobError, or InvalidExampleError where one example is at fault.
        """
        if not examples:
            raise InvalidJobError("There is no example.")
        for start in range(0, len(examples), _EXAMPLES_A_PART):
            self._check_part(examples[start : start + _EXAMPLES_A_PART])

    def _check_part(self, examples: Sequence[Example]) -> None:
        lengths = [example.num_tokens for example in examples]
        if min(lengths) == 0 or lengths != [len(example.is_label) for example in examples]:
            raise InvalidExampleError("An example has nothing to learn.")
        is_target, starts = np.concatenate([example.is_label for example in examples]), np.cumsum([0, *lengths[:-1]])
        is_target[starts] = False  # no token comes before the first one, so it is not predicted
        if not np.logical_or.reduceat(is_target, starts).all():
            raise InvalidExampleError("An example has nothing to learn.")
        if max(lengths) > self.max_tokens:
            raise InvalidExampleError(
                f"An example has {max(lengths)} tokens; this worker takes {self.max_tokens} a step."
            )
        token_ids = np.concatenate([example.token_ids for example in examples])
        if token_ids.min() < 0 or token_ids.max() >= self.shape.vocab_size:
            raise InvalidExampleError("An example has a token id outside the base's vocabulary.")
