"""Why the engine refuses or gives up.

EngineError
|- UnsupportedBaseError    this base cannot be fused; the operator must choose another
|- NoFreeSlotError         every slot is taken; the caller waits
|- InvalidJobError         the job cannot be trained on this base (the job's own fault)
|- DivergedError           its gradient stayed not finite (the job's own fault)
'- JobTooLargeError        one example alone does not fit the device (the job's own fault)
"""

from __future__ import annotations


class EngineError(Exception):
    code = "engine_error"
    is_job_fault = False


class UnsupportedBaseError(EngineError):
    code = "base_model_unsupported"


class NoFreeSlotError(EngineError):
    code = "no_free_slot"


class InvalidJobError(EngineError):
    code = "invalid_job"
    is_job_fault = True


class DivergedError(EngineError):
    code = "diverged"
    is_job_fault = True


class JobTooLargeError(EngineError):
    code = "oom_gpu"
    is_job_fault = True
