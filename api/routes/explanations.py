"""/v1/fine_tuning/jobs/{id}/explain: why a job waits, and when it may end."""

from __future__ import annotations

from fastapi import APIRouter

from api.dependencies import Caller, Now, Settings, Transaction, needs
from api.routing import OneThreadRoute
from api.schemas.explanations import ExplanationObject
from core.domain.api_keys import Scope
from core.domain.ids import IdKind, parse_id
from core.services.explanations import explain_job

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], route_class=OneThreadRoute)


@router.get("/{job_id}/explain", dependencies=[needs(Scope.READ)])
def get_explanation(
    session: Transaction, caller: Caller, settings: Settings, now: Now, job_id: str
) -> ExplanationObject:
    parsed = parse_id(IdKind.JOB, job_id)
    terms = settings.fairness_terms
    return ExplanationObject.of(explain_job(session, caller.tenant_id, job_id=parsed, now=now, terms=terms))
