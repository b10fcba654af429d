"""/v1/fine_tuning/alpha/graders: refused, because this service has no reinforcement fine-tuning."""

from __future__ import annotations

from typing import Any

from api.dependencies import needs
from api.document import describe_refusal
from api.routers import TenantRouter
from core.domain.api_keys import Scope
from core.domain.errors import UnsupportedError

router = TenantRouter("/v1/fine_tuning/alpha/graders", tag="graders")
_REFUSED: dict[int | str, dict[str, Any]] = {501: describe_refusal("Graders are not supported")}


@router.post(
    "/validate",
    summary="Validate a grader (not supported)",
    dependencies=[needs(Scope.SUBMIT)],
    status_code=501,
    responses=_REFUSED,
    operation_id="validate_grader",
)
@router.post(
    "/run",
    summary="Run a grader (not supported)",
    dependencies=[needs(Scope.SUBMIT)],
    status_code=501,
    responses=_REFUSED,
    operation_id="run_grader",
)
def refuse_grader() -> None:
    """Refuse every grader: this service has no reinforcement fine-tuning."""
    raise UnsupportedError("Graders are not supported: this service has no reinforcement fine-tuning.")
