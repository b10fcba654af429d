"""The operator's commands on a running stack."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.integration.stack.running import BASE_MODEL, Up, espalier, list_models
from tests.waiting import PATIENCE_SECONDS, wait_until


def test_an_operator_makes_tenants_and_keys_and_revokes_keys(up: Up) -> None:
    where = ("--data-dir", up.data_dir)
    first, second = (
        espalier(*words, *where).stdout.strip() for words in (("tenants", "create", "acme"), ("keys", "create", "acme"))
    )
    assert first != second
    assert list_models(up.state.api_url, first).is_success
    assert list_models(up.state.api_url, second).is_success
    assert espalier("keys", "revoke", first.split("_")[2], *where).exit_code == 0
    wait_until(lambda: list_models(up.state.api_url, first).status_code == 401)
    assert list_models(up.state.api_url, second).is_success


def test_an_operator_sets_quotas_rotates_keys_switches_bases_and_reads_who_did_what(up: Up) -> None:
    where = ("--data-dir", up.data_dir)

    def run(*words: str) -> str:
        done = espalier(*words, *where)
        assert done.exit_code == 0, done.stdout
        return done.stdout

    base = BASE_MODEL
    run("tenants", "create", "hooli")
    run("tenants", "set", "hooli", "--weight", "2.5", "--max-tokens-per-job", "1000000", "--allow", base)
    assert all(word in run("tenants", "list", "--json") for word in ("hooli", "2.5", "1000000", base))
    run("tenants", "set", "hooli", "--max-tokens-per-job", "none", "--allow", "none")
    rotated = run("keys", "rotate", "hooli", "first").strip()
    assert list_models(up.state.api_url, rotated).is_success
    assert run("keys", "list", "hooli").count("first") == 2
    run("tenants", "disable", "hooli")
    wait_until(lambda: list_models(up.state.api_url, rotated).status_code == 403)
    run("tenants", "enable", "hooli")
    run("base-models", "disable", base)
    wait_until(lambda: not list_models(up.state.api_url, rotated).json().get("data", [0]))
    run("base-models", "enable", base)
    operator = run("operators", "create", "olga").strip()
    asked: dict[str, Any] = {"headers": {"Authorization": f"Bearer {operator}"}, "trust_env": False}
    assert (
        httpx.get(f"{up.state.api_url}/admin/tenants/hooli", **asked, timeout=PATIENCE_SECONDS).json()[
            "max_tokens_per_job"
        ]
        is None
    )
    run("operators", "revoke", operator.split("_")[2])
    assert httpx.get(f"{up.state.api_url}/admin/tenants/hooli", **asked, timeout=PATIENCE_SECONDS).status_code == 401
    said = run("audit", "--tenant", "hooli")
    assert said.index("tenant.changed") < said.index("tenant.created")
    assert "cli:" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("tenants", "create", "local"), "There is a tenant 'local' already."),
        (("keys", "create", "nobody"), "There is no tenant 'nobody'."),
        (("tenants", "set", "local", "--weight", "0"), "weight: Input should be greater than or equal to 0.01."),
        (("base-models", "disable", "gpt-9"), "There is no base model 'gpt-9'."),
        (("keys", "revoke", "nothing"), "There is no API key 'nothing'."),
    ],
)
def test_an_operators_mistake_is_told_in_words(up: Up, words: tuple[str, ...], told: str) -> None:
    done = espalier(*words, "--data-dir", up.data_dir)
    assert done.exit_code == 1
    assert done.stderr.strip() == told
