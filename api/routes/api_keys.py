"""/v1/api_keys: a tenant's administrators make, list and revoke its API keys."""

from __future__ import annotations

from api.dependencies import Caller, Database, Transaction, needs
from api.parameters import KeyId, WithChildren
from api.routers import TenantRouter
from api.schemas.api_keys import ApiKeyObject, CreateApiKey, IssuedApiKeyObject
from api.schemas.openai.lists import DeletedObject, ListObject
from core.db.session import tenant_transaction
from core.domain.api_keys import Scope, parse_key_id
from core.services import api_keys

router = TenantRouter("/v1/api_keys", tag="api-keys")


@router.post("", summary="Make an API key", dependencies=[needs(Scope.ADMIN)])
def create_api_key(database: Database, caller: Caller, body: CreateApiKey) -> IssuedApiKeyObject:
    """Make a key that may do what its maker may, at most. The answer is the only one that shows the whole key."""
    # The transaction ends here: others may wait for its lock in every thread that there is.
    with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
        issued = api_keys.issue_api_key(
            session,
            caller.tenant_id,
            name=body.name,
            scopes=body.asked_scopes,
            lifetime=body.lifetime,
            maker_id=caller.key_id,
        )
    return IssuedApiKeyObject.of_issued(issued)


@router.get("", summary="List API keys", dependencies=[needs(Scope.ADMIN)])
def list_api_keys(session: Transaction, caller: Caller) -> ListObject[ApiKeyObject]:
    """List the live keys, oldest first, in one answer."""
    rows = [ApiKeyObject.of(row) for row in api_keys.list_api_keys(session, caller.tenant_id)]
    return ListObject(data=rows)


@router.get("/{key_id}", summary="Get an API key", dependencies=[needs(Scope.ADMIN)])
def get_api_key(session: Transaction, caller: Caller, key_id: KeyId) -> ApiKeyObject:
    """Return a live key without its secret."""
    return ApiKeyObject.of(api_keys.get_api_key(session, caller.tenant_id, key_id=parse_key_id(key_id)))


@router.delete("/{key_id}", summary="Revoke an API key", dependencies=[needs(Scope.ADMIN)])
def revoke_api_key(
    session: Transaction, caller: Caller, key_id: KeyId, *, with_children: WithChildren = False
) -> DeletedObject:
    """End a key. With `with_children`, end the keys too that were made with it."""
    api_keys.revoke_api_key(session, caller.tenant_id, key_id=parse_key_id(key_id), with_children=with_children)
    return DeletedObject(id=key_id, object="organization.api_key")
