"""Why the trainer gives up a job.

TrainerError
|- JobFaultError        the job's own data or settings; another attempt would end the same
|  '- NothingLearnedError  its adapter does nothing
|- JobStoppedError      an order has stopped it, so that what it still does in the background is of no use
|- TransferError        a dataset or an artifact could not be moved; another attempt may do
|  '- UrlRefusedError   the URL is at fault, and not what it names: it has expired, or its signature is not taken
|- AdapterInvalidError  the finished adapter did not pass its own inspection
|- BaseRefusedError     the base cannot be served as it is registered, by whichever worker
'- WorkerUnfitError     this worker cannot load the base; another may
"""

from __future__ import annotations

from core.domain.dataset_counts import DatasetName
from worker.messages import URL_REFUSED


class TrainerError(Exception):
    """`file` is the job's file at fault, if one is; `line_number` and `field` say where in it."""

    code = "trainer_error"
    is_job_fault = False

    def __init__(
        self,
        message: str,
        *,
        file: DatasetName | None = None,
        line_number: int | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.file = file
        self.line_number = line_number
        self.field = field


class JobFaultError(TrainerError):
    code = "invalid_training_data"
    is_job_fault = True


class NothingLearnedError(JobFaultError):
    """The adapter changes nothing: its settings or its rows have left every lora_B at zero."""

    code = "nothing_learned"


class JobStoppedError(TrainerError):
    code = "stopped"


class TransferError(TrainerError):
    code = "storage_refused"


class UrlRefusedError(TransferError):
    code = URL_REFUSED


class BaseRefusedError(TrainerError):
    """The base model cannot be served as it is registered. Its operator must act."""

    code = "base_model_refused"


class WorkerUnfitError(TrainerError):
    """This worker cannot load the base, for lack of memory, disk or a package. Another worker may be able to."""

    code = "worker_unfit"


class AdapterInvalidError(TrainerError):
    """The finished adapter did not pass its own inspection."""

    code = "adapter_invalid"
