"""Observations of a job: the numbers of its steps, as attempts record them and as charts show them.

A chart has a bounded number of points. The range of steps is cut into stretches, and each stretch keeps three steps:

- the one with the least training loss
- the one with the greatest training loss, so that no spike is lost, as it would be in an average
- the last one that was evaluated, or else the last one

A long range is cut at the borders of blocks of 32 steps. A trigger sums up the least and greatest loss of each block
(migration 0031), so a chart of 300,000 steps reads about 9,400 rows. Parts of the range without such a summary are read
step by step.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select, text, update

from core.db.models import Job, Observation
from core.db.session import ServiceSession, TenantSession
from core.domain.leases import Lease
from core.services.events import record_event
from core.services.leases import lock_held

_ROWS_A_STRETCH = 3
_STEPS_A_BLOCK = 32
# PostgreSQL would switch to a generic plan after ten executions on a connection. Before the statistics of the blocks
# were gathered, this plan read every step for every block, which took more than a minute.
_PLAN_ANEW = text("set local plan_cache_mode = force_custom_plan")
# One block of 32 steps is one row of `spans`, with its summary if it lies wholly inside the range. `looked` has one row
# for each summary, and one for each single step where there is none; `stretch` numbers the stretches from 0. `kept`
# picks the steps of each stretch. `spans` is materialized because a condition on `metrics` that contains arithmetic
# cannot be pushed through row-level security into the index.
_KEPT = text("""
with spans as materialized (
    select s.last_step, greatest(s.last_step - 31, :first) as low, least(s.last_step, :last) as high, b.num_steps,
        b.least_loss, b.least_step, b.greatest_loss, b.greatest_step, b.evaluated_step
    from generate_series(cast(:first_end as bigint), :last_end, 32) s (last_step)
    left join metric_blocks b on b.tenant_id = :tenant_id and b.job_id = :job_id and b.last_step = s.last_step
        and s.last_step between :first_whole and :last_whole
), looked as materialized (
    select (last_step - :origin) / :unit * :num_stretches / :num_units as stretch, num_steps, least_loss, least_step,
        greatest_loss, greatest_step, evaluated_step, last_step
    from spans where num_steps is not null
    union all
    select (case when :unit = 1 then m.step else s.last_step end - :origin) / :unit * :num_stretches / :num_units, 1,
        m.train_loss, m.step, m.train_loss, m.step, case when m.valid_loss is not null then m.step end, m.step
    from spans s join metrics m on m.tenant_id = :tenant_id and m.job_id = :job_id and m.step between s.low and s.high
    where s.num_steps is null
), kept as (
    (select distinct on (stretch) least_step as step from looked order by stretch, least_loss, least_step desc)
    union
    (select distinct on (stretch) greatest_step from looked order by stretch, greatest_loss desc, greatest_step desc)
    union
    select coalesce(max(evaluated_step), max(last_step)) from looked group by stretch
)
select (select sum(num_steps)::bigint from looked), array(select step from kept)
""")


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one optimizer step."""

    step: int
    train_loss: float
    train_token_accuracy: float
    learning_rate: float
    grad_norm: float
    num_tokens: int


@dataclass(frozen=True)
class StepRange:
    """The steps from `first` to `last`, both included."""

    first: int
    last: int

    @property
    def num_steps(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class ObservationSeries:
    """Rows that represent the `num_steps` steps of a range. `is_thinned` says that there are fewer rows than steps."""

    rows: tuple[Observation, ...]
    num_steps: int

    @property
    def is_thinned(self) -> bool:
        return len(self.rows) < self.num_steps


def record_step(session: ServiceSession, lease: Lease, *, record: StepRecord, total_steps: int) -> None:
    """Store the numbers of one step and show them as an event. A step that is already stored is not changed."""
    job = _pass_step(session, lease, record.step)
    if job is None:
        return
    session.add(
        Observation(
            job_id=job.id,
            tenant_id=job.tenant_id,
            lease_token=lease.token,
            step=record.step,
            train_loss=record.train_loss,
            train_token_accuracy=record.train_token_accuracy,
            learning_rate=record.learning_rate,
            grad_norm=record.grad_norm,
            num_tokens=record.num_tokens,
        )
    )
    record_event(
        session,
        job,
        message=f"Step {record.step}/{total_steps}: training loss={record.train_loss:.4f}",
        details={
            "step": record.step,
            "total_steps": total_steps,
            "train_loss": record.train_loss,
            "train_mean_token_accuracy": record.train_token_accuracy,
            "learning_rate": record.learning_rate,
            "num_tokens": record.num_tokens,
        },
    )


def record_skipped_step(session: ServiceSession, lease: Lease, *, step: int, total_steps: int) -> None:
    """Count a step that changed nothing, and record an event. A step that is already counted is not counted again."""
    job = _pass_step(session, lease, step)
    if job is None:
        return
    job.skipped_steps += 1
    record_event(
        session,
        job,
        level="warn",
        message=f"Step {step}/{total_steps} was skipped: its gradient was not finite.",
        details={"step": step, "total_steps": total_steps, "is_skipped": True},
    )


def record_evaluation(session: ServiceSession, lease: Lease, *, step: int, loss: float, token_accuracy: float) -> None:
    """Store the validation result that belongs to a step."""
    job = lock_held(session, lease)
    session.execute(
        update(Observation)
        .where(Observation.job_id == job.id, Observation.step == step)
        .values(valid_loss=loss, valid_token_accuracy=token_accuracy)
    )
    details = {"step": step, "full_valid_loss": loss, "full_valid_mean_token_accuracy": token_accuracy}
    record_event(session, job, message=f"Step {step}: validation loss={loss:.4f}", details=details)


def read_observations(
    session: TenantSession, tenant_id: uuid.UUID, *, job_id: uuid.UUID, steps: StepRange, points: int
) -> ObservationSeries:
    """Return at most `points` (at least 3) steps of a job within a range, in order."""
    in_range = Observation.step.between(steps.first, steps.last)
    own: tuple[ColumnElement[bool], ...] = (Observation.tenant_id == tenant_id, Observation.job_id == job_id, in_range)
    found = _find_range(session, own)
    if found is None:
        return ObservationSeries(rows=(), num_steps=0)
    if found.num_steps > points:
        cut = _cut(found, num_stretches=points // _ROWS_A_STRETCH)
        session.execute(_PLAN_ANEW)
        num_steps, kept = session.execute(_KEPT, {"tenant_id": tenant_id, "job_id": job_id, **cut}).one()
        if num_steps > points:
            own = (*own, Observation.step == func.any(kept))
            return ObservationSeries(_read_rows(session, own), num_steps)
    rows = _read_rows(session, own)
    return ObservationSeries(rows, len(rows))


def _pass_step(session: ServiceSession, lease: Lease, step: int) -> Job | None:
    """Move the job to a completed step. Return None if it is already there or beyond."""
    job = lock_held(session, lease)
    if step <= job.trained_steps:
        return None
    job.trained_steps = step
    if step > job.furthest_step:
        job.furthest_step, job.num_uncounted = step, 0
    return job


def _find_range(session: TenantSession, own: tuple[ColumnElement[bool], ...]) -> StepRange | None:
    """Return the first and the last existing step. Each is one index look-up, where `min` might read more."""
    ends = [
        session.scalar(select(Observation.step).where(*own).order_by(order).limit(1))
        for order in (Observation.step, Observation.step.desc())
    ]
    first, last = ends
    return None if first is None or last is None else StepRange(first, last)


def _cut(steps: StepRange, *, num_stretches: int) -> dict[str, int]:
    """Return how `_KEPT` cuts a range: between blocks if there are enough of them, else between any two steps."""
    first_end, last_end = _end_of_block(steps.first), _end_of_block(steps.last)
    cut = {"first": steps.first, "last": steps.last, "first_end": first_end, "last_end": last_end}
    num_blocks = (last_end - first_end) // _STEPS_A_BLOCK + 1
    if num_blocks >= num_stretches:
        whole = {"first_whole": steps.first + _STEPS_A_BLOCK - 1, "last_whole": steps.last}
        units = {"origin": first_end, "unit": _STEPS_A_BLOCK, "num_units": num_blocks}
    else:
        whole = {"first_whole": 1, "last_whole": 0}  # no summary is used
        units = {"origin": steps.first, "unit": 1, "num_units": steps.num_steps}
    return {**cut, **whole, **units, "num_stretches": num_stretches}


def _end_of_block(step: int) -> int:
    return -(-step // _STEPS_A_BLOCK) * _STEPS_A_BLOCK


def _read_rows(session: TenantSession, own: tuple[ColumnElement[bool], ...]) -> tuple[Observation, ...]:
    rows: Sequence[Observation] = session.scalars(select(Observation).where(*own).order_by(Observation.step)).all()
    return tuple(rows)
