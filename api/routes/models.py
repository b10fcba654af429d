"""/v1/models: the base models to train against, and the caller's own fine-tuned models and checkpoints."""

from __future__ import annotations

from fastapi import Depends

from api.admission import LISTINGS
from api.dependencies import Caller, Transaction, needs
from api.parameters import ModelName
from api.routers import TenantRouter
from api.schemas.openai.lists import DeletedObject, ListObject
from api.schemas.openai.models import BaseModelObject, FineTunedModelObject
from core.domain.api_keys import Scope
from core.domain.errors import PermissionDeniedError
from core.domain.jobs import is_checkpoint_model, is_fine_tuned_model
from core.services import adapters, base_models, checkpoints

router = TenantRouter("/v1/models", tag="models")
_MAX_MODELS = 1000


@router.get("", summary="List models", dependencies=[needs(Scope.READ), Depends(LISTINGS)])
def list_models(session: Transaction, caller: Caller) -> ListObject[BaseModelObject | FineTunedModelObject]:
    """List the base models and the newest 1,000 fine-tuned ones. This list has no cursor; `/v1/adapters` has one."""
    bases = [BaseModelObject.of(row) for row in base_models.list_allowed_base_models(session, caller.tenant_id)]
    own = adapters.list_models(session, caller.tenant_id, limit=_MAX_MODELS)
    fine_tuned = [FineTunedModelObject.of(model) for model in own.items]
    return ListObject(data=[*bases, *fine_tuned], has_more=own.has_more)


@router.get(
    "/{model:path}",
    summary="Get a model",
    dependencies=[needs(Scope.READ)],
    response_description="A base model, a fine-tuned model or a checkpoint.",
)
def get_model(session: Transaction, caller: Caller, model: ModelName) -> BaseModelObject | FineTunedModelObject:
    """Return a base model, a fine-tuned model or a checkpoint."""
    if is_checkpoint_model(model):
        return FineTunedModelObject.of_checkpoint(checkpoints.find_checkpoint(session, caller.tenant_id, name=model))
    if is_fine_tuned_model(model):
        return FineTunedModelObject.of(adapters.find_adapter(session, caller.tenant_id, name=model).model)
    return BaseModelObject.of(base_models.get_base_model(session, caller.tenant_id, base_model_id=model))


@router.delete("/{model:path}", summary="Delete a model", dependencies=[needs(Scope.SUBMIT)])
def delete_model(session: Transaction, caller: Caller, model: ModelName) -> DeletedObject:
    """Delete a fine-tuned model, or one checkpoint, with its files."""
    if is_checkpoint_model(model):
        checkpoints.delete_checkpoint(session, caller.tenant_id, name=model)
    elif is_fine_tuned_model(model):
        adapters.delete_adapter(session, caller.tenant_id, name=model)
    else:
        base = base_models.get_base_model(session, caller.tenant_id, base_model_id=model)
        raise PermissionDeniedError(f"{base.id} is a base model; only the operator can remove it.", param="model")
    return DeletedObject(id=model, object="model")
