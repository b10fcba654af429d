"""How many tokens a fused step may have: fewer after one that ran out of memory or was given up, then more again.

| event | effect |
|---|---|
| a step ran out of memory | `tokens` is halved: a long example may have been the cause |
| a step was given up | `tokens` is halved and becomes the `cap`: the device is slow |
| a job leaves | `tokens` is `cap` again |
| `_BRISK_STEPS` in a row were quick | `cap` is doubled, and `tokens` too unless memory is short |

Always tokens <= cap <= configured.
"""

from __future__ import annotations

import structlog

log = structlog.get_logger()
# After this many quick steps in a row, a shortened step may have twice as many tokens again.
_BRISK_STEPS = 100


class TokenBudget:
    """The token budget of the next step, in tokens of all slots together."""

    def __init__(self, configured: int) -> None:
        self.tokens = configured
        self.cap = configured
        self._configured = configured
        self._num_brisk_steps = 0

    def halve(self, num_tokens: int) -> None:
        """Halve after a step of this many tokens ran out of memory: its batches come again, in smaller steps."""
        self.tokens = max(1, min(self.tokens, num_tokens) // 2)
        log.warning("engine.budget_halved", budget_tokens=self.tokens)

    def shorten(self, num_tokens: int) -> None:
        """Lower the cap after a step of this many tokens was given up: none on this device is to be this long again."""
        self.halve(num_tokens)
        self.cap = self.tokens
        self._num_brisk_steps = 0

    def restore(self) -> None:
        """Undo the halving for lack of memory, now that a job has left."""
        self.tokens = self.cap

    def lengthen(self, num_tokens: int, *, was_brisk: bool) -> None:
        """Note a step, and double shortened steps after many quick ones, because a slow device may be quick again.

        Only steps that were at least half full count, because a short one does not show how long a full one takes.
        """
        if self.cap == self._configured:
            return
        if not was_brisk:
            self._num_brisk_steps = 0
        elif 2 * num_tokens >= self.tokens:
            self._num_brisk_steps += 1
        if self._num_brisk_steps < _BRISK_STEPS:
            return
        self._num_brisk_steps = 0
        is_short_of_memory = self.tokens < self.cap
        self.cap = min(2 * self.cap, self._configured)
        if not is_short_of_memory:
            self.tokens = self.cap
        log.info("engine.steps_lengthened", max_tokens_per_step=self.cap)
