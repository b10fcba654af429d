"""/v1/fine_tuning/alpha/graders: OpenAI's graders belong to reinforcement fine-tuning, which this service lacks."""

from __future__ import annotations

from fastapi import APIRouter

from api.dependencies import Caller
from core.domain.errors import UnsupportedError

router = APIRouter(prefix="/v1/fine_tuning/alpha/graders", tags=["graders"])


@router.post("/validate")
@router.post("/run")
def refuse_grader(_caller: Caller) -> None:
    raise UnsupportedError("Graders are not supported: this service has no reinforcement fine-tuning.")
