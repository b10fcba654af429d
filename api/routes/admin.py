"""/admin: what operators do over HTTP, by the same services as the command line. No tenant's key opens it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from api.dependencies import Database, Operator, OperatorTransaction
from api.parameters import After, BaseModelId, KeyId, OfTenant, TenantSlug, WithChildren, page_limit
from api.routers import OperatorRouter
from api.schemas.admin import (
    AuditObject,
    ChangeTenant,
    CreateTenant,
    KnownBaseModelObject,
    SwitchBaseModel,
    TenantObject,
)
from api.schemas.api_keys import ApiKeyObject, CreateApiKey, IssuedApiKeyObject
from api.schemas.openai.lists import DeletedObject, ListObject, as_list
from core.db.session import operator_transaction
from core.domain.api_keys import parse_key_id
from core.services import api_keys, audit, base_models, tenants

router = OperatorRouter("/admin", tag="admin")
Limit = Annotated[int, page_limit(1000)]


@router.post("/tenants", summary="Add a tenant")
def create_tenant(session: OperatorTransaction, body: CreateTenant) -> TenantObject:
    """Add a tenant with the default limits."""
    return TenantObject.of(tenants.create_tenant(session, body.slug, name=body.name))


@router.get("/tenants", summary="List tenants")
def list_tenants(session: OperatorTransaction, limit: Limit = 100, after: After = None) -> ListObject[TenantObject]:
    """List the tenants by slug. The cursor is a slug."""
    page = tenants.list_tenants(session, after=after, limit=limit)
    return ListObject(data=[TenantObject.of(row) for row in page.items], has_more=page.has_more)


@router.get("/tenants/{slug}", summary="Get a tenant")
def get_tenant(session: OperatorTransaction, slug: TenantSlug) -> TenantObject:
    """Return a tenant and its limits."""
    return TenantObject.of(tenants.find_tenant(session, slug))


@router.post("/tenants/{slug}", summary="Change a tenant")
def change_tenant(session: OperatorTransaction, slug: TenantSlug, body: ChangeTenant) -> TenantObject:
    """Set the fields that the request gives. The others stay as they are."""
    return TenantObject.of(tenants.change_tenant(session, slug, change=body))


@router.delete("/tenants/{slug}", summary="Delete a tenant")
def delete_tenant(session: OperatorTransaction, slug: TenantSlug) -> TenantObject:
    """Delete a tenant with all that it has, for ever. The answer has the slug by which it is seen from now on."""
    return TenantObject.of(tenants.delete_tenant(session, slug))


@router.post("/tenants/{slug}/api_keys", summary="Make a tenant's API key")
def create_api_key(database: Database, operator: Operator, slug: TenantSlug, body: CreateApiKey) -> IssuedApiKeyObject:
    """Make an API key of a tenant. The answer is the only one that shows the whole key."""
    # The transaction ends here: others may wait for its lock in every thread that there is.
    with operator_transaction(database, actor=operator.actor) as session:
        tenant = tenants.find_tenant(session, slug)
        issued = api_keys.issue_api_key(
            session, tenant.id, name=body.name, scopes=body.asked_scopes, lifetime=body.lifetime
        )
    return IssuedApiKeyObject.of_issued(issued)


@router.get("/tenants/{slug}/api_keys", summary="List a tenant's API keys")
def list_api_keys(session: OperatorTransaction, slug: TenantSlug) -> ListObject[ApiKeyObject]:
    """List the live keys of a tenant, oldest first, in one answer."""
    rows = api_keys.list_api_keys(session, tenants.find_tenant(session, slug).id)
    return ListObject(data=[ApiKeyObject.of(row) for row in rows])


@router.delete("/tenants/{slug}/api_keys/{key_id}", summary="Revoke a tenant's API key")
def revoke_api_key(
    session: OperatorTransaction, slug: TenantSlug, key_id: KeyId, *, with_children: WithChildren = False
) -> DeletedObject:
    """End a key. With `with_children`, end the keys too that were made with it."""
    tenant = tenants.find_tenant(session, slug)
    api_keys.revoke_api_key(session, tenant.id, key_id=parse_key_id(key_id), with_children=with_children)
    return DeletedObject(id=key_id, object="organization.api_key")


@router.get("/base_models", summary="List base models")
def list_base_models(session: OperatorTransaction) -> ListObject[KnownBaseModelObject]:
    """List every base model that is known, offered or not."""
    rows = base_models.list_known_base_models(session)
    return ListObject(data=[KnownBaseModelObject.of(row) for row in rows])


@router.post("/base_models/{base_model_id:path}", summary="Switch a base model on or off")
def switch_base_model(
    session: OperatorTransaction, base_model_id: BaseModelId, body: SwitchBaseModel
) -> KnownBaseModelObject:
    """Let tenants use a base model or not, whatever the registry says. Jobs that are submitted already go on."""
    row = base_models.switch_base_model(session, base_model_id, is_disabled=body.is_disabled)
    return KnownBaseModelObject.of(row)


@router.get("/audit", summary="List the audit log")
def list_audit_entries(
    session: OperatorTransaction,
    limit: Limit = 100,
    after: Annotated[
        int | None, Query(ge=0, le=2**62, description="The id of the last entry of the page before. Absent at first.")
    ] = None,
    tenant: OfTenant = None,
) -> ListObject[AuditObject]:
    """List changes, newest first, of one tenant or of all."""
    tenant_id = tenants.find_tenant(session, tenant).id if tenant is not None else None
    return as_list(audit.list_audit_entries(session, tenant_id, before=after, limit=limit), AuditObject.of)
