"""How many tokens a fused step may have: fewer after one that ran out of memory or was given up, then more again.

Memory and patience shorten steps in two ways. A step that ran out of memory halves `tokens`, until a job leaves: its
long examples may have been the cause. A step that was given up lowers `cap` as well, until many steps in a row were
quick. Always tokens <= cap <= configured.
"""

from __future__ import annotations

import structlog

log = structlog.get_logger()
# A shortened step is allowed twice as many tokens again after so many that would still have been quick enough.
_BRISK_STEPS = 100


class TokenBudget:
    """The token budget of the next step, in tokens of all slots together."""

    def __init__(self, configured: int) -> None:
        self.tokens = configured
        self.cap = configured
        self._configured = configured
        self._num_brisk_steps = 0

    def halve(self, num_tokens: int) -> None:
        """Answer a step of so many tokens that ran out of memory: its batches come again, in smaller steps."""
        self.tokens = max(1, min(self.tokens, num_tokens) // 2)
        log.warning("engine.budget_halved", budget_tokens=self.tokens)

    def shorten(self, num_tokens: int) -> None:
        """Answer a step of so many tokens that was given up: let none be so long again on this device."""
        self.halve(num_tokens)
        self.cap = self.tokens
        self._num_brisk_steps = 0

    def restore(self) -> None:
        """Undo what want of memory did to the budget, now that a job has left."""
        self.tokens = self.cap

    def lengthen(self, num_tokens: int, *, was_brisk: bool) -> None:
        """Take note of a step, and double shortened steps after many quick ones: a slow device may be quick again.

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
