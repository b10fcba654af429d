"""/v1/fine_tuning/jobs/{id}/metrics: the numbers of a job's steps, thinned out for a chart."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query

from api.admission import LISTINGS
from api.dependencies import Caller, Transaction, needs
from api.parameters import JobId
from api.routers import TenantRouter
from api.schemas.observations import MetricSeriesObject
from core.domain.api_keys import Scope
from core.domain.errors import InvalidRequestError
from core.domain.ids import IdKind, parse_id
from core.services import jobs
from core.services.observations import StepRange, read_observations

router = TenantRouter("/v1/fine_tuning/jobs", tag="fine-tuning")
_MAX_STEP = 2**40


@router.get("/{job_id}/metrics", summary="Get a job's metrics", dependencies=[needs(Scope.READ), Depends(LISTINGS)])
def get_metrics(
    session: Transaction,
    caller: Caller,
    job_id: JobId,
    from_step: Annotated[int, Query(ge=1, le=_MAX_STEP, description="The first step to show.")] = 1,
    to_step: Annotated[int, Query(ge=1, le=_MAX_STEP, description="The last step to show.")] = _MAX_STEP,
    points: Annotated[int, Query(ge=3, le=3000, description="How many steps the answer may hold.")] = 600,
) -> MetricSeriesObject:
    """Return at most `points` steps: of every stretch the least and the greatest training loss, and one evaluation."""
    if from_step > to_step:
        raise InvalidRequestError(f"from_step is {from_step}, behind to_step {to_step}.", param="from_step")
    job = jobs.get_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id))
    steps = StepRange(from_step, to_step)
    return MetricSeriesObject.of(
        read_observations(session, caller.tenant_id, job_id=job.id, steps=steps, points=points)
    )
