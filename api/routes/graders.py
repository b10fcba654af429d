"""/v1/fine_tuning/alpha/graders: OpenAI's graders belong to reinforcement fine-tuning, which this service lacks."""

from __future__ import annotations

from fastapi import APIRouter

from api.dependencies import needs
from api.routing import OneThreadRoute
from core.domain.api_keys import Scope
from core.domain.errors import UnsupportedError

router = APIRouter(prefix="/v1/fine_tuning/alpha/graders", tags=["graders"], route_class=OneThreadRoute)


@router.post("/validate", dependencies=[needs(Scope.SUBMIT)], status_code=501, operation_id="validate_grader")
@router.post("/run", dependencies=[needs(Scope.SUBMIT)], status_code=501, operation_id="run_grader")
def refuse_grader() -> None:
    raise UnsupportedError("Graders are not supported: this service has no reinforcement fine-tuning.")
