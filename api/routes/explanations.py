"""/v1/fine_tuning/jobs/{id}/explain: why a job waits, and when it may end."""

from __future__ import annotations

from api.dependencies import Caller, Now, Settings, Transaction, needs
from api.parameters import JobId
from api.routers import TenantRouter
from api.schemas.explanations import ExplanationObject
from core.domain.api_keys import Scope
from core.domain.ids import IdKind, parse_id
from core.services.explanations import explain_job

router = TenantRouter("/v1/fine_tuning/jobs", tag="fine-tuning")


@router.get("/{job_id}/explain", summary="Explain why a job waits", dependencies=[needs(Scope.READ)])
def get_explanation(
    session: Transaction, caller: Caller, settings: Settings, now: Now, job_id: JobId
) -> ExplanationObject:
    """Say what must change first for a job to start, where it stands in the queue, and when it may end."""
    parsed = parse_id(IdKind.JOB, job_id)
    terms = settings.fairness_terms
    return ExplanationObject.of(explain_job(session, caller.tenant_id, job_id=parsed, now=now, terms=terms))
