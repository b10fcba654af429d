"""Only one thing of one tenant may be deleted at a time, whatever a row says."""

from __future__ import annotations

import uuid

import pytest

from core.domain.objects import attempt_prefix, file_key, is_location, is_location_of, upload_prefix

TENANT, OTHER, ROW = (uuid.UUID(int=number) for number in (1, 2, 3))


@pytest.mark.parametrize(
    "location",
    [
        file_key(TENANT, ROW),
        upload_prefix(TENANT, ROW),
        attempt_prefix(TENANT, ROW, 7),
        attempt_prefix(TENANT, ROW, 7) + "adapter/",
        attempt_prefix(TENANT, ROW, 7) + "result/r.csv",
    ],
)
def test_what_the_service_names_may_be_deleted_by_its_own_tenant_only(location: str) -> None:
    assert is_location(location)
    assert is_location_of(TENANT, location)
    assert not is_location_of(OTHER, location)


@pytest.mark.parametrize(
    "location",
    [
        "",
        "/",
        "tenants/",
        f"tenants/{TENANT}/",
        f"tenants/{TENANT}/files/",
        f"tenants/{TENANT}/jobs/{ROW}/",
        f"tenants/{TENANT}/jobs/{ROW}/7/../../",
        f"tenants/{TENANT}/uploads/",
        "bases/tokenizers/a.json",
        f"x/tenants/{TENANT}/jobs/{ROW}/7/",
    ],
)
def test_what_could_be_more_than_one_thing_is_never_deleted(location: str) -> None:
    assert not is_location(location)
    assert not is_location_of(TENANT, location)
