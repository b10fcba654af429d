"""Why an attempt ended when its trainer cannot say it: how the process ended, in words that a tenant understands.

| how it ended | code | would a job alone in it end the same again? |
|---|---|---|
| it found no more memory on the host (`OUT_OF_MEMORY_EXIT_CODE`) | `oom_host` | yes |
| killed by SIGKILL | `trainer_killed` | no |
| another signal or exit code | `trainer_crashed` | no |
| this worker stopped it, because it made no progress | `stalled` | yes |
| this worker stopped it, because its leases were about to end | `lease_lost` | no |
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from worker.messages import OUT_OF_MEMORY_EXIT_CODE, STORAGE_AWAY


@dataclass(frozen=True)
class Failure:
    """`code` is public; `message` is a sentence that a tenant understands.

    `is_final_alone` says that a job that was alone in its trainer would end the same again, so it is not retried.
    """

    code: str
    message: str
    is_final_alone: bool = False


STALLED = Failure("stalled", "The training made no progress for too long and was stopped.", is_final_alone=True)
UNCONFIRMED = Failure(
    STORAGE_AWAY, "What the trainer wrote could not be confirmed in the object store, which does not answer."
)
DAMAGED = Failure("integrity", "What the trainer wrote is not what the object store has.")
UNRECORDABLE = Failure("unrecordable", "What the trainer reported could not be recorded.")
LEASE_LOST = Failure("lease_lost", "The worker lost touch with the database and stopped itself.")
# The codes of a trainer's death, of the failures above and below.
TRAINER_DEATH_CODES = ("lease_lost", "oom_host", "stalled", "trainer_crashed", "trainer_killed")
_OOM_HOST = Failure(
    "oom_host",
    "The worker's memory did not suffice for this job. Lower max_seq_len, the rank or the size of the dataset.",
    is_final_alone=True,
)


def explain_exit(exit_code: int) -> Failure:
    """Say how a trainer process died; a negative exit code is a signal's number."""
    if exit_code == OUT_OF_MEMORY_EXIT_CODE:
        return _OOM_HOST
    if exit_code == -signal.SIGKILL:
        return Failure("trainer_killed", "The trainer process was killed, perhaps for want of memory.")
    if exit_code < 0:
        return Failure("trainer_crashed", f"The trainer process crashed ({signal.Signals(-exit_code).name}).")
    return Failure("trainer_crashed", f"The trainer process ended unexpectedly (exit code {exit_code}).")
