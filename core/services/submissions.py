"""Submits a job.

Everything that can be checked without a GPU is checked, and every "auto" becomes a number. The queued row itself is the
outbox: a notification after the commit only makes the start quicker.
"""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import BindParameter, Select, Text, Uuid, and_, bindparam, event, literal, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import aliased

from core.crashpoints import CrashPoint, reach
from core.db.locks import lock_for_tenant, shared_lock_call
from core.db.models import BaseModelRow, BaseTokenizer, File, Job, Tenant
from core.db.session import TenantSession, notify_after_commit
from core.domain.dataset_counts import DatasetName
from core.domain.errors import InvalidRequestError, NotFoundError
from core.domain.ids import IdKind, new_id, parse_id
from core.domain.job_requests import JobRequest
from core.domain.jobs import JobStatus, is_checkpoint_model, is_fine_tuned_model, pool_name
from core.domain.training import (
    ALL_LINEAR,
    BASE_LEARNING_RATE,
    AdapterConfig,
    TrainingSpec,
    count_steps,
    resolve_alpha,
    resolve_batch_size,
    resolve_epochs,
    resolve_learning_rate,
)
from core.domain.values import Frozen
from core.services.adapters import find_adapter, get_adapter
from core.services.base_models import check_is_usable, get_base_model, is_usable_by
from core.services.checkpoints import find_checkpoint
from core.services.events import insert_first_event
from core.services.files import get_file, is_live_file
from core.services.jobs import WAKE_CHANNEL
from core.services.quotas import check_queue, check_tokens, has_queue_place, is_within_storage, refuse_storage
from core.telemetry.tracing import current_traceparent

_NEW_COLUMNS = (
    "id",
    "tenant_id",
    "name_digits",
    "base_model_id",
    "quantization",
    "pool",
    "training_file_id",
    "validation_file_id",
    "suffix",
    "metadata",
    "spec",
    "request_hash",
    "total_steps",
    "priority",
    "traceparent",
)


class DatasetRows(Frozen):
    """The rows of a tenant's file, and how one base would tokenise them."""

    file: DatasetName
    tenant_id: uuid.UUID
    object_key: str
    sha256: str
    tokenizer_key: str
    max_seq_len: int


class UncheckedRowsError(Exception):
    """The rows were not yet rendered with the base's chat template. Rendering them needs no transaction."""

    def __init__(self, rows: DatasetRows) -> None:
        super().__init__(rows)
        self.rows = rows


def submit_job(
    session: TenantSession,
    tenant_id: uuid.UUID,
    *,
    request: JobRequest,
    request_hash: bytes | None = None,
    shared_lock: str | None = None,
    is_checked: Callable[[DatasetRows], bool] = lambda _rows: True,
) -> Job:
    """Check a request and queue it. Raises InvalidRequestError naming the field, or the error of a quota.

    The advisory lock `shared_lock` is taken by the first query, because round trips are most of the cost. If the base's
    tokenizer is known, rows that are not checked raise UncheckedRowsError.
    """
    found = _find_means(session, tenant_id, request, shared_lock=shared_lock)
    if not found.is_within_storage:
        raise refuse_storage(session, tenant_id)
    base = found.base or _get_trainable(session, tenant_id, model=request.base_model_id)
    training_file = _check_files(session, tenant_id, request, found)
    _check_quantization(base, request.quantization)
    check_is_usable(base)
    spec = resolve_spec(request, base=base, num_examples=training_file.num_examples)
    check_tokens(spec, quota=found.max_tokens, dataset=training_file)
    _require_checked(found, training_file, max_seq_len=spec.max_seq_len, is_checked=is_checked)
    new = {
        "tenant_id": tenant_id,
        "base_model_id": base.id,
        "quantization": request.quantization,
        "pool": pool_name(base.id, request.quantization),
        "training_file_id": request.training_file_id,
        "validation_file_id": request.validation_file_id,
        "suffix": request.suffix,
        "metadata": request.metadata,
        "spec": spec.model_dump(mode="json"),
        "request_hash": request_hash,
        "total_steps": count_steps(spec, training_file.num_examples),
        "priority": request.priority,
        "traceparent": current_traceparent(),
    }
    return _queue_job(session, tenant_id, new=new)


def resolve_spec(request: JobRequest, *, base: BaseModelRow, num_examples: int) -> TrainingSpec:
    """Return the training with every "auto" a number. Raises InvalidRequestError against the base's limits."""
    if not 1 <= request.rank <= base.max_rank:
        raise _invalid(f"adapter.rank is {request.rank}; {base.id} takes 1 to {base.max_rank}.", "adapter.rank")
    max_seq_len = request.max_seq_len or base.max_seq_len
    if max_seq_len > base.max_seq_len:
        raise _invalid(f"max_seq_len is {max_seq_len}; {base.id} takes at most {base.max_seq_len}.", "max_seq_len")
    learning_rate = request.learning_rate or resolve_learning_rate(request.learning_rate_multiplier or 1.0)
    if not math.isfinite(learning_rate):
        raise _invalid("The learning rate is not a finite number.", "learning_rate")
    return TrainingSpec(
        adapter=AdapterConfig(
            rank=request.rank,
            alpha=resolve_alpha(request.rank) if request.alpha is None else request.alpha,
            dropout=request.dropout,
            target_modules=_resolve_target_modules(request, base),
            use_rslora=request.use_rslora,
        ),
        n_epochs=request.n_epochs or resolve_epochs(num_examples),
        batch_size=request.batch_size or resolve_batch_size(num_examples),
        learning_rate=learning_rate,
        learning_rate_multiplier=learning_rate / BASE_LEARNING_RATE,
        learning_rate_schedule=request.learning_rate_schedule,
        warmup_ratio=request.warmup_ratio,
        weight_decay=request.weight_decay,
        max_grad_norm=request.max_grad_norm,
        max_seq_len=max_seq_len,
        seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
    )


def _check_files(session: TenantSession, tenant_id: uuid.UUID, request: JobRequest, found: _Means) -> File:
    """Return the training file. Raises InvalidRequestError for a file that does not exist or cannot be trained on."""
    training_file = found.training_file or _get_dataset(session, tenant_id, request.training_file_id, "training_file")
    _check_dataset(training_file, param="training_file")
    if request.validation_file_id is not None:
        validation_id = request.validation_file_id
        validation = found.validation_file or _get_dataset(session, tenant_id, validation_id, "validation_file")
        _check_dataset(validation, param="validation_file")
    return training_file


def _get_trainable(session: TenantSession, tenant_id: uuid.UUID, *, model: str) -> BaseModelRow:
    """Return a base. Raises InvalidRequestError for a fine-tuned model, by each name that the tenant may use for it."""
    if is_checkpoint_model(model):
        checkpoint = find_checkpoint(session, tenant_id, name=model)
        raise _refuse_warm_start(checkpoint.model_name.split(":")[1])  # a base's id has no colon
    if is_fine_tuned_model(model):
        raise _refuse_warm_start(find_adapter(session, tenant_id, name=model).row.base_model_id)
    with suppress(NotFoundError):  # no adapter: then it is the name of a base, or of nothing
        adapter = get_adapter(session, tenant_id, adapter_id=parse_id(IdKind.ADAPTER, model))
        raise _refuse_warm_start(adapter.row.base_model_id)
    return get_base_model(session, tenant_id, base_model_id=model)


def _refuse_warm_start(base_model_id: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Training on from a fine-tuned model is not supported yet. Start from its base, {base_model_id!r}.",
        code="warm_start_unsupported",
        param="model",
    )


@dataclass(frozen=True)
class _Means:
    """What a job needs, as far as the tenant has it."""

    base: BaseModelRow | None
    tokenizer_key: str | None
    training_file: File | None
    validation_file: File | None
    max_tokens: int | None
    is_within_storage: bool


def _find_means(
    session: TenantSession, tenant_id: uuid.UUID, request: JobRequest, *, shared_lock: str | None
) -> _Means:
    values = {
        "tenant_id": tenant_id,
        "base_model_id": request.base_model_id,
        "training_file_id": request.training_file_id,
        "validation_file_id": request.validation_file_id,
    }
    if shared_lock is None:
        return _Means(*session.execute(_means_query(), values).one())
    return _Means(*session.execute(_locking_means_query(), values | {"shared_lock": shared_lock}).one()[:-1])


@cache
def _means_query() -> Select[BaseModelRow, str | None, File, File, int | None, bool]:
    """Built once, because building the query takes longer than running it."""
    # One row by outer joins on primary keys. What does not exist for the tenant is null, so one round trip finds every
    # fault.
    tenant_id: BindParameter[uuid.UUID] = bindparam("tenant_id", type_=Uuid)
    base_model_id: BindParameter[str] = bindparam("base_model_id", type_=Text)
    training, validation = aliased(File), aliased(File)
    return (
        select(
            BaseModelRow,
            BaseTokenizer.object_key,
            training,
            validation,
            Tenant.max_tokens_per_job,
            is_within_storage(),
        )
        .select_from(Tenant)
        .outerjoin(BaseModelRow, and_(BaseModelRow.id == base_model_id, is_usable_by(tenant_id)))
        .outerjoin(BaseTokenizer, BaseTokenizer.base_model_id == BaseModelRow.id)
        .outerjoin(training, is_live_file(training, tenant_id, bindparam("training_file_id", type_=Uuid)))
        .outerjoin(validation, is_live_file(validation, tenant_id, bindparam("validation_file_id", type_=Uuid)))
        .where(Tenant.id == tenant_id)
    )


@cache
def _locking_means_query() -> Select[BaseModelRow, str | None, File, File, int | None, bool, None]:
    return _means_query().add_columns(shared_lock_call(bindparam("shared_lock", type_=Text)))


def _require_checked(
    found: _Means, training_file: File, *, max_seq_len: int, is_checked: Callable[[DatasetRows], bool]
) -> None:
    """Raise UncheckedRowsError for a file whose rows can be checked and are not. Passes before a load of the base."""
    files: dict[DatasetName, File | None] = {"training": training_file, "validation": found.validation_file}
    for name, file in files.items():
        if file is not None and (key := found.tokenizer_key) is not None:
            rows = DatasetRows(
                file=name,
                tenant_id=file.tenant_id,
                object_key=file.object_key,
                sha256=file.sha256,
                tokenizer_key=key,
                max_seq_len=max_seq_len,
            )
            if not is_checked(rows):
                raise UncheckedRowsError(rows)


def _queue_job(session: TenantSession, tenant_id: uuid.UUID, *, new: dict[str, Any]) -> Job:
    """Add a job and its first event in one statement, and announce the work. Raises RateLimitedError by quota.

    The event needs no notification: followers learn of the job only after the commit, and find the event then.
    """
    lock_for_tenant(session, tenant_id, purpose="queue")
    while (added := _add_job(session, new)) is None:
        check_queue(session, tenant_id)  # or the digits belong to another job; new ones are drawn
    notify_after_commit(session, WAKE_CHANNEL, added.pool)
    event.listen(session, "after_commit", lambda _session: reach(CrashPoint.POST_INSERT), once=True)
    return added


def _add_job(session: TenantSession, new: dict[str, Any]) -> Job | None:
    """Add a job under a new id. Return None if the queue is full, or the name of its model is taken."""
    job_id = new_id()
    drawn = {"id": job_id, "name_digits": job_id.hex[-8:], "event_id": new_id()}
    added: Job | None = session.scalar(_addition(), new | drawn)
    return added


@cache
def _addition() -> Select[Any]:
    """Built once, too."""
    table = Job.__table__.c
    new = {name: bindparam(name, type_=table[name].type) for name in _NEW_COLUMNS}
    row = select(*new.values(), literal(JobStatus.QUEUED, Text)).where(has_queue_place(new["tenant_id"]))
    addition = insert(Job).from_select([*(table[name] for name in new), table.status], row)
    fresh = addition.on_conflict_do_nothing(index_elements=[table.tenant_id, table.name_digits])
    added = fresh.returning(*table).cte("added")
    return (
        select(aliased(Job, added))
        .select_from(added)
        .add_cte(insert_first_event(added, message="Validated the files and queued the job."))
    )


def _get_dataset(session: TenantSession, tenant_id: uuid.UUID, file_id: uuid.UUID, param: str) -> File:
    try:
        return get_file(session, tenant_id, file_id=file_id, param=param)
    except NotFoundError as error:
        raise InvalidRequestError(error.message, code="file_not_found", param=param) from error


def _check_dataset(row: File, *, param: str) -> None:
    if row.purpose != "fine-tune":
        raise _invalid(f"The file's purpose is {row.purpose!r}; upload it with purpose 'fine-tune'.", param)
    if row.status == "error":
        raise InvalidRequestError(
            f"The file cannot be trained on: {row.status_details} Upload a corrected file.",
            code="invalid_file",
            param=param,
        )


def _check_quantization(base: BaseModelRow, quantization: str | None) -> None:
    if quantization is not None and quantization not in base.quantizations:
        known = ", ".join(base.quantizations) or "none"
        raise _invalid(f"{base.id} cannot be quantized to {quantization!r}; allowed: {known}.", "quantization")


def _resolve_target_modules(request: JobRequest, base: BaseModelRow) -> tuple[str, ...]:
    if request.target_modules == ALL_LINEAR:
        return tuple(sorted(base.target_modules))
    lacking = sorted(set(request.target_modules) - set(base.target_modules))
    if lacking or not request.target_modules:
        raise _invalid(
            f"{base.id} has no linear module named {', '.join(map(repr, lacking)) or '(none given)'}; "
            f"it has {', '.join(sorted(base.target_modules))}.",
            "adapter.target_modules",
        )
    return tuple(sorted(set(request.target_modules)))


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param)
