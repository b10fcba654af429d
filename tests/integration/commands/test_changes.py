"""A command that changes something prints one line, and asks before it deletes a tenant."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.factories.bases import REGISTRY
from tests.factories.tenants import Tenant
from tests.integration.commands.invocations import Espalier, documents_of, read_terminal


def test_what_a_command_has_changed_is_one_line(espalier: Espalier, tenant: Tenant, tmp_path: Path) -> None:
    registry = tmp_path / "registry.yaml"
    registry.write_text(yaml.safe_dump(REGISTRY))
    slug = tenant.slug
    for words, told in (
        (("tenants", "set", slug, "--weight", "2.5", "--max-queued", "7"), f"Tenant {slug}: weight 2.5, max_queued 7."),
        (("tenants", "set", slug, "--max-storage-bytes", "none"), f"Tenant {slug}: max_storage_bytes none."),
        (("tenants", "set", slug), f"Tenant {slug}: nothing was named, and all stays."),
        (("tenants", "disable", slug), f"Tenant {slug} is disabled."),
        (("tenants", "enable", slug), f"Tenant {slug} is enabled."),
        (
            ("migrate", "--registry", str(registry)),
            "The schema is the newest; the registry has 1 base models; no role's password was set.",
        ),
    ):
        assert espalier(*words).stdout.splitlines() == [told]


def test_a_tenant_is_deleted_only_by_somebody_who_types_its_slug_or_is_sure(
    espalier: Espalier, env: dict[str, str], tenant: Tenant
) -> None:
    words = ["tenants", "delete", tenant.slug]
    refused = espalier(*words)
    assert (refused.exit_code, "Say --yes." in refused.stderr) == (1, True)
    told = read_terminal(words, env, 200, typed="another\n", exit_code=1)
    assert "Nothing was deleted." in told[-1]
    assert tenant.slug in espalier("tenants", "list", "--json").stdout
    told = read_terminal(words, env, 200, typed=f"{tenant.slug}\n")
    assert f"This deletes all jobs, models, files, uploads and keys of the tenant {tenant.slug}." in "".join(told)
    new_slug = f"deleted-{tenant.id.hex[-8:]}"
    assert f"Tenant {tenant.slug} is now {new_slug}." in "".join(told)
    listed = documents_of(espalier("tenants", "list", "--json").stdout)
    assert {row["slug"]: row["deletion"] for row in listed}[new_slug] == "being deleted"
    assert espalier("tenants", "enable", new_slug).stderr == "This organization is deleted, for ever.\n"
    assert espalier(*words, "--yes").stderr == f"There is no tenant {tenant.slug!r}.\n"
