"""/admin: what operators do by HTTP. The same services stand under the command line. No tenant's key opens it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from api.dependencies import Database, Operator, OperatorGate, OperatorTransaction
from api.routing import OneThreadRoute
from api.schemas.admin import (
    AuditObject,
    ChangeTenant,
    CreateTenant,
    KnownBaseModelObject,
    SwitchBaseModel,
    TenantObject,
)
from api.schemas.api_keys import ApiKeyObject, CreateApiKey, IssuedApiKeyObject
from api.schemas.objects import DeletedObject, ListObject, as_list
from core.db.session import operator_transaction
from core.domain.api_keys import parse_key_id
from core.services import api_keys, audit, base_models, tenants

router = APIRouter(prefix="/admin", tags=["admin"], route_class=OneThreadRoute, dependencies=[Depends(OperatorGate())])
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.post("/tenants")
def create_tenant(session: OperatorTransaction, body: CreateTenant) -> TenantObject:
    return TenantObject.of(tenants.create_tenant(session, body.slug, name=body.name))


@router.get("/tenants")
def list_tenants(
    session: OperatorTransaction, limit: Limit = 100, after: str | None = None
) -> ListObject[TenantObject]:
    """List tenants by slug; the cursor is a slug."""
    page = tenants.list_tenants(session, after=after, limit=limit)
    return ListObject(data=[TenantObject.of(row) for row in page.items], has_more=page.has_more)


@router.get("/tenants/{slug}")
def get_tenant(session: OperatorTransaction, slug: str) -> TenantObject:
    return TenantObject.of(tenants.find_tenant(session, slug))


@router.post("/tenants/{slug}")
def change_tenant(session: OperatorTransaction, slug: str, body: ChangeTenant) -> TenantObject:
    """Set the fields that are given; null is no limit, or every base model."""
    return TenantObject.of(tenants.change_tenant(session, slug, change=body))


@router.delete("/tenants/{slug}")
def delete_tenant(session: OperatorTransaction, slug: str) -> TenantObject:
    """Delete a tenant with all that it has, for ever. The answer has the slug by which it is seen from now on."""
    return TenantObject.of(tenants.delete_tenant(session, slug))


@router.post("/tenants/{slug}/api_keys")
def create_api_key(database: Database, operator: Operator, slug: str, body: CreateApiKey) -> IssuedApiKeyObject:
    """Make a key. The transaction ends here: others may wait for its lock in every thread that there is."""
    with operator_transaction(database, actor=operator.actor) as session:
        tenant = tenants.find_tenant(session, slug)
        issued = api_keys.issue_api_key(
            session, tenant.id, name=body.name, scopes=body.asked_scopes, lifetime=body.lifetime
        )
    return IssuedApiKeyObject.of_issued(issued)


@router.get("/tenants/{slug}/api_keys")
def list_api_keys(session: OperatorTransaction, slug: str) -> ListObject[ApiKeyObject]:
    rows = api_keys.list_api_keys(session, tenants.find_tenant(session, slug).id)
    return ListObject(data=[ApiKeyObject.of(row) for row in rows])


@router.delete("/tenants/{slug}/api_keys/{key_id}")
def revoke_api_key(
    session: OperatorTransaction, slug: str, key_id: str, *, with_children: bool = False
) -> DeletedObject:
    """End a key, and with it all keys that came of it if `with_children`."""
    tenant = tenants.find_tenant(session, slug)
    api_keys.revoke_api_key(session, tenant.id, key_id=parse_key_id(key_id), with_children=with_children)
    return DeletedObject(id=key_id, object="organization.api_key")


@router.get("/base_models")
def list_base_models(session: OperatorTransaction) -> ListObject[KnownBaseModelObject]:
    rows = base_models.list_known_base_models(session)
    return ListObject(data=[KnownBaseModelObject.of(row) for row in rows])


@router.post("/base_models/{base_model_id:path}")
def switch_base_model(session: OperatorTransaction, base_model_id: str, body: SwitchBaseModel) -> KnownBaseModelObject:
    row = base_models.switch_base_model(session, base_model_id, is_disabled=body.is_disabled)
    return KnownBaseModelObject.of(row)


@router.get("/audit")
def list_audit_entries(
    session: OperatorTransaction,
    limit: Limit = 100,
    after: Annotated[int | None, Query(ge=0, le=2**62)] = None,
    tenant: str | None = None,
) -> ListObject[AuditObject]:
    """List changes, newest first, of one tenant (by slug) or of all."""
    tenant_id = tenants.find_tenant(session, tenant).id if tenant is not None else None
    return as_list(audit.list_audit_entries(session, tenant_id, before=after, limit=limit), AuditObject.of)
