"""What a tenant shares on purpose opens one thing, for a limited time."""

from __future__ import annotations

import re

import httpx
import pytest

from tests.factories.bases import BASE_MODEL
from tests.factories.tenants import Tenant
from tests.integration.api.crossing.routes import never_was
from tests.integration.api.crossing.watching import Watched
from tests.integration.api.planting import Planted
from tests.waiting import PATIENCE_SECONDS


def test_sharing_with_a_tenant_does_not_tell_whether_there_is_one(
    walled: Watched, planted: Planted, own: Planted, asker: Tenant, victim: Tenant
) -> None:
    path, told = f"/v1/fine_tuning/checkpoints/{own.checkpoint_model}/permissions", []
    for each in (planted.tenant, never_was(planted.tenant), victim.slug, never_was(victim.slug)):
        answer = walled.ask("POST", path, asker, json={"project_ids": [each]})
        shown = answer.json()["data"][0]
        told.append((answer.status_code, sorted(shown), list(walled.statements)))
        walled.ask("DELETE", f"{path}/{shown['id']}", asker)
    assert told == [told[0]] * 4


def test_a_shared_checkpoint_is_read_by_whom_it_names_and_ends_with_the_permission(
    walled: Watched, planted: Planted, own: Planted, asker: Tenant, victim: Tenant
) -> None:
    path = f"/v1/fine_tuning/checkpoints/{planted.checkpoint_model}"
    made = walled.ask("POST", f"{path}/permissions", victim, json={"project_ids": [own.tenant]}).json()["data"][0]
    assert walled.ask("GET", path, asker).status_code == 200
    for verb, refused in (("DELETE", f"/v1/models/{planted.checkpoint_model}"), ("GET", f"{path}/permissions")):
        assert walled.ask(verb, refused, asker).status_code == 404
    assert walled.ask("DELETE", f"{path}/permissions/{made['id']}", asker).status_code == 404
    assert walled.ask("DELETE", f"{path}/permissions/{made['id']}", victim).status_code == 200
    assert walled.ask("GET", path, asker).status_code == 404


@pytest.mark.fault(46)
def test_a_presigned_url_opens_one_object_of_its_tenant_for_fifteen_minutes_and_nothing_else(
    walled: Watched, planted: Planted, own: Planted, asker: Tenant, victim: Tenant
) -> None:
    told = walled.ask("GET", f"/v1/adapters/{own.adapter}/download", asker).json()
    (url,) = [file["url"] for file in told["files"]]
    with httpx.Client(trust_env=False, timeout=PATIENCE_SECONDS) as stranger:
        assert stranger.get(url).status_code == 200
        assert f"/tenants/{asker.id}/" in url
        assert 0 < int(httpx.URL(url).params["X-Amz-Expires"]) <= 900
        own_key, *_ = [key for key in own.object_keys if key in url]
        for key in planted.object_keys + tuple(key for key in own.object_keys if key != own_key):
            assert stranger.get(url.replace(own_key, key)).status_code in (403, 404)
        assert stranger.get(url.replace(str(asker.id), str(victim.id))).status_code in (403, 404)
        assert stranger.get(url.partition("?")[0]).status_code in (403, 404)
        assert stranger.get(re.sub(r"X-Amz-Expires=\d+", "X-Amz-Expires=86400", url)).status_code == 403
        for verb in ("PUT", "DELETE", "POST"):
            assert stranger.request(verb, url).status_code in (403, 405)
        assert stranger.get(url).status_code == 200


def test_one_idempotency_key_of_two_tenants_makes_two_jobs(
    walled: Watched, planted: Planted, own: Planted, asker: Tenant, victim: Tenant
) -> None:
    made = []
    for tenant, file in ((asker, own.file), (victim, planted.file)):
        headers = {"authorization": f"Bearer {tenant.api_key}", "idempotency-key": "the-same"}
        body = {"model": BASE_MODEL, "training_file": file}
        answer = walled.client.post("/v1/fine_tuning/jobs", headers=headers, json=body)
        assert answer.status_code == 200, answer.text
        made.append(answer.json())
    assert made[0]["id"] != made[1]["id"]
    assert made[0]["organization_id"] != made[1]["organization_id"]
