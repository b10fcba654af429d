"""The messages between the supervisor and its trainer: small typed values, one JSON object a line, over two pipes.

The supervisor talks to PostgreSQL and signs URLs. The trainer holds the base model and the tenants' data, and names a
job by its lease token alone. The only credentials in these messages are presigned URLs.

An `Order` goes to the trainer, a `Report` comes from it. One attempt, in order:

    StartJob    -> DatasetsRead, [SlotRefused], JobStarted
                   StepDone or StepSkipped, [EvaluationDone], UsageCounted ...
                   UrlsWanted -> UrlsGranted, then CheckpointSaved or ResumePointSaved ...
                   DeviceLeft, and JobSucceeded or JobFailed
    YieldJob    -> DeviceLeft, JobYielded
    StopJob     -> DeviceLeft
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from core.domain.dataset_counts import DatasetCounts
from core.domain.training import TrainingSpec
from core.domain.values import Frozen, StoredFile

# The trainer's exit code when the host has no memory left for it.
OUT_OF_MEMORY_EXIT_CODE = 71
# Failures that are not charged to a job: the object store is away, or it accepts none of the URLs.
STORAGE_AWAY = "storage_unavailable"
URL_REFUSED = "storage_url_refused"
UNCOUNTED_CODES = (STORAGE_AWAY, URL_REFUSED)


class RemoteFile(Frozen):
    """A dataset to fetch: its presigned URL and the hash of its bytes."""

    url: str = Field(repr=False)
    sha256: str
    size_bytes: int


class RemoteResumePoint(Frozen):
    """A stored slot state to resume from; its files by name."""

    step: int
    files: dict[str, RemoteFile]


class JobFacts(Frozen):
    """The facts about a job that the manifest and the model card state, beyond its spec."""

    job_id: str
    tenant: str
    model_name: str
    base_model_id: str
    base_revision: str
    quantization: str | None
    created_at: int
    base_license: str | None = None


class LoadBase(Frozen):
    """The base to hold. Slot states are due every `resume_steps` steps or `resume_seconds`.

    The trainer inspects its files, answers BaseInspected, and waits for LoadWeights.
    """

    kind: Literal["load_base"] = "load_base"
    base_model_id: str
    source_kind: Literal["path", "gguf", "hub"]
    location: str
    revision: str
    dtype: Literal["float32", "bfloat16"]
    quantization: Literal["nf4"] | None
    target_modules: tuple[str, ...]
    chat_template: str | None
    slots: int
    max_rank: int
    max_tokens_per_step: int
    cache_dir: str
    resume_steps: int
    resume_seconds: float
    storage_patience_seconds: float


class LoadWeights(Frozen):
    """The inspected base is wanted, and there is room for it."""

    kind: Literal["load_weights"] = "load_weights"


class StartJob(Frozen):
    """`share` weighs what the tenant, named by its id, may use of a step, however many jobs it has here.

    `resume_points` are those that earlier attempts left, the newest first.
    """

    kind: Literal["start_job"] = "start_job"
    lease_token: int
    tenant_id: str
    share: float
    spec: TrainingSpec
    facts: JobFacts
    training_file: RemoteFile
    validation_file: RemoteFile | None
    resume_points: tuple[RemoteResumePoint, ...] = ()


class StopJob(Frozen):
    kind: Literal["stop_job"] = "stop_job"
    lease_token: int


class YieldJob(Frozen):
    """Store the job's slot at this step boundary, free the slot, and report JobYielded."""

    kind: Literal["yield_job"] = "yield_job"
    lease_token: int


class UrlsGranted(Frozen):
    kind: Literal["urls_granted"] = "urls_granted"
    lease_token: int
    artifact: str
    urls: dict[str, str] = Field(repr=False)


class BaseInspected(Frozen):
    """The base's files can be loaded, as far as this shows without reading the weights."""

    kind: Literal["base_inspected"] = "base_inspected"
    tokenizer_path: str


class BaseLoaded(Frozen):
    kind: Literal["base_loaded"] = "base_loaded"
    seconds: float


class BaseRefused(Frozen):
    """The base cannot be loaded, and the trainer ends. `is_worker_fault` says that another worker may be able to."""

    kind: Literal["base_refused"] = "base_refused"
    message: str
    is_worker_fault: bool


class Alive(Frozen):
    """The training loop has turned, or its step continues. Only the loop itself sends this, at most once a second."""

    kind: Literal["alive"] = "alive"


class DeviceFigures(Frozen):
    """What the device did since the last such report, its memory, and the jobs that wait for memory now.

    `peak_flops` is None where the device's peak is not known.
    """

    kind: Literal["device_figures"] = "device_figures"
    device: str
    step_seconds: tuple[float, ...]
    flops: float
    peak_flops: float | None
    memory_used_bytes: int
    memory_total_bytes: int
    num_preparing: int
    num_waiting: int


class PhaseDone(Frozen):
    """A phase of an attempt is over. `began_at` is by the machine's clock, in seconds; an upload names its artifact."""

    kind: Literal["phase_done"] = "phase_done"
    lease_token: int
    phase: Literal["load", "train", "evaluate", "export", "upload"]
    began_at: float
    seconds: float
    artifact: str | None = None
    size_bytes: int = 0


class DatasetsRead(Frozen):
    """The job's files are tokenised. Says how many of their rows are used, truncated or dropped."""

    kind: Literal["datasets_read"] = "datasets_read"
    lease_token: int
    training: DatasetCounts
    validation: DatasetCounts | None


class JobStarted(Frozen):
    """The job has a slot, and resumes after this step; 0 is the start. `total_steps` is the number of all its steps."""

    kind: Literal["job_started"] = "job_started"
    lease_token: int
    step: int
    total_steps: int


class SlotRefused(Frozen):
    """The device has no memory for the job's slot beside the others. The job waits until JobStarted reports a slot."""

    kind: Literal["slot_refused"] = "slot_refused"
    lease_token: int


class JobWarned(Frozen):
    kind: Literal["job_warned"] = "job_warned"
    lease_token: int
    message: str


class JobLogged(Frozen):
    """A line for the job's own log, which its tenant may read: a name and numbers, never a row's words."""

    kind: Literal["job_logged"] = "job_logged"
    lease_token: int
    name: str = Field(max_length=100)
    details: dict[str, str | int | float | bool | None]


class StepDone(Frozen):
    kind: Literal["step_done"] = "step_done"
    lease_token: int
    step: int
    total_steps: int
    train_loss: float
    train_token_accuracy: float
    learning_rate: float
    grad_norm: float
    num_tokens: int


class StepSkipped(Frozen):
    """A step whose gradient was not finite is over. It has changed nothing."""

    kind: Literal["step_skipped"] = "step_skipped"
    lease_token: int
    step: int
    total_steps: int


class EvaluationDone(Frozen):
    kind: Literal["evaluation_done"] = "evaluation_done"
    lease_token: int
    step: int
    loss: float
    token_accuracy: float


class UrlsWanted(Frozen):
    """Asks for one presigned PUT URL for each file of an artifact.

    Artifacts are "adapter", "result", "checkpoints/step-<n>" and "resume/step-<n>".
    """

    kind: Literal["urls_wanted"] = "urls_wanted"
    lease_token: int
    artifact: str
    names: tuple[str, ...]


class CheckpointMetrics(Frozen):
    """A step's numbers as a checkpoint shows them. Validation numbers exist only if the step was evaluated."""

    step: float
    train_loss: float
    train_accuracy: float
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None

    def by_name(self) -> dict[str, float]:
        """Return the numbers that there are, as rows, cards and manifests have them."""
        return self.model_dump(exclude_none=True)


class CheckpointSaved(Frozen):
    kind: Literal["checkpoint_saved"] = "checkpoint_saved"
    lease_token: int
    step: int
    artifact: str
    files: tuple[StoredFile, ...]
    metrics: CheckpointMetrics


class ResumePointSaved(Frozen):
    kind: Literal["resume_point_saved"] = "resume_point_saved"
    lease_token: int
    step: int
    artifact: str
    files: tuple[StoredFile, ...]


class JobYielded(Frozen):
    """The job has left its slot. Everything of it that could be stored is stored."""

    kind: Literal["job_yielded"] = "job_yielded"
    lease_token: int


class DeviceLeft(Frozen):
    """The job has left its slot and every step, or will never reach one. Uploads of its files may be under way."""

    kind: Literal["device_left"] = "device_left"
    lease_token: int


class UsageCounted(Frozen):
    """What the job has used of the device so far. The last report before a job's end is the bill."""

    kind: Literal["usage_counted"] = "usage_counted"
    lease_token: int
    gpu_seconds: float
    trained_tokens: int


class JobSucceeded(Frozen):
    kind: Literal["job_succeeded"] = "job_succeeded"
    lease_token: int
    adapter_files: tuple[StoredFile, ...]
    result_file: StoredFile
    trained_tokens: int


class JobFailed(Frozen):
    """The attempt is over. `param` is the field of the submission at fault: "training_file" or "validation_file"."""

    kind: Literal["job_failed"] = "job_failed"
    lease_token: int
    code: str
    message: str
    is_job_fault: bool
    param: str | None = None


Order = Annotated[LoadBase | LoadWeights | StartJob | StopJob | YieldJob | UrlsGranted, Field(discriminator="kind")]
Report = Annotated[
    BaseInspected
    | BaseLoaded
    | BaseRefused
    | Alive
    | DeviceFigures
    | PhaseDone
    | DatasetsRead
    | JobStarted
    | SlotRefused
    | JobWarned
    | JobLogged
    | StepDone
    | StepSkipped
    | EvaluationDone
    | UrlsWanted
    | CheckpointSaved
    | ResumePointSaved
    | JobYielded
    | DeviceLeft
    | UsageCounted
    | JobSucceeded
    | JobFailed,
    Field(discriminator="kind"),
]
ORDERS: TypeAdapter[Order] = TypeAdapter(Order)
REPORTS: TypeAdapter[Report] = TypeAdapter(Report)


def encode_line(message: Frozen) -> bytes:
    return message.model_dump_json().encode() + b"\n"
