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

from core.domain.failures import Failure
from worker.messages import OUT_OF_MEMORY_EXIT_CODE, STORAGE_AWAY

STALLED = Failure(code="stalled", message="The training made no progress for too long and was stopped.")
UNCONFIRMED = Failure(
    code=STORAGE_AWAY,
    message="What the trainer wrote could not be confirmed in the object store, which does not answer.",
)
DAMAGED = Failure(code="integrity", message="What the trainer wrote is not what the object store has.")
UNRECORDABLE = Failure(code="unrecordable", message="What the trainer reported could not be recorded.")
_OOM_HOST = Failure(
    code="oom_host",
    message="The worker's memory did not suffice for this job. Lower max_seq_len, the rank or the size of the dataset.",
)
# The codes of a trainer's death: of LEASE_LOST, and of the failures above and below.
TRAINER_DEATH_CODES = ("lease_lost", "oom_host", "stalled", "trainer_crashed", "trainer_killed")


def explain_exit(exit_code: int) -> Failure:
    """Say how a trainer process died; a negative exit code is a signal's number."""
    if exit_code == OUT_OF_MEMORY_EXIT_CODE:
        return _OOM_HOST
    if exit_code == -signal.SIGKILL:
        told = "The trainer process was killed, perhaps for want of memory."
        return Failure(code="trainer_killed", message=told)
    told = f"ended unexpectedly (exit code {exit_code})"
    if exit_code < 0:
        told = f"crashed ({signal.Signals(-exit_code).name})"
    return Failure(code="trainer_crashed", message=f"The trainer process {told}.")


def is_final_alone(failure: Failure) -> bool:
    """Return whether a job that was alone in its trainer would end the same again, so it is not retried."""
    return failure in (STALLED, _OOM_HOST)
