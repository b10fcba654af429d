"""Why the engine refuses or gives up.

EngineError
|- UnsupportedBaseError    this base cannot be fused; the operator must choose another
|- NoFreeSlotError         no slot or no memory is free; the caller waits
|- InvalidJobError         the job cannot be trained on this base (the job's own fault)
|  '- InvalidExampleError  ... because of one example
|- UnreadableStateError    a saved state is of a format that this version does not read
|- DivergedError           its gradient stayed not finite (the job's own fault)
'- JobTooLargeError        the job does not fit the device (the job's own fault)
   '- ExampleTooLargeError ... one example alone does not
"""

from __future__ import annotations


class EngineError(Exception):
    """`is_about_example` says that the error concerns an example of training, or of the evaluation under way."""

    is_about_example = False
    code = "engine_error"
    is_job_fault = False


class UnsupportedBaseError(EngineError):
    code = "base_model_unsupported"


class NoFreeSlotError(EngineError):
    code = "no_free_slot"


class InvalidJobError(EngineError):
    code = "invalid_job"
    is_job_fault = True


class UnreadableStateError(EngineError):
    code = "state_unreadable"


class DivergedError(EngineError):
    code = "diverged"
    is_job_fault = True


class JobTooLargeError(EngineError):
    code = "oom_gpu"
    is_job_fault = True


class InvalidExampleError(InvalidJobError):
    is_about_example = True


class ExampleTooLargeError(JobTooLargeError):
    is_about_example = True
