"""Why an attempt ended that the trainer could not explain itself: how its process died, in words."""

from __future__ import annotations

import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """`code` is public; `message` is a sentence a tenant understands."""

    code: str
    message: str


STALLED = Failure("trainer_stalled", "The trainer made no progress for too long and was stopped.")
STORAGE = Failure("storage_unavailable", "What the trainer wrote could not be confirmed in the object store.")
LEASE_LOST = Failure("lease_lost", "The worker lost touch with the database and stopped itself.")


def explain_exit(exit_code: int) -> Failure:
    """Say how a trainer process died; a negative exit code is a signal's number."""
    if exit_code == -signal.SIGKILL:
        return Failure("trainer_killed", "The trainer process was killed, perhaps for want of memory.")
    if exit_code < 0:
        return Failure("trainer_crashed", f"The trainer process crashed ({signal.Signals(-exit_code).name}).")
    return Failure("trainer_crashed", f"The trainer process ended unexpectedly (exit code {exit_code}).")
