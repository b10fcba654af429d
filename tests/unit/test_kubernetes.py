"""The files of k8s/, read or run by a shell, without kubectl. `make check-k8s` checks what Kustomize renders."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.k8s_names import print_secrets
from tests.deploy.k8s_render import K8S, ROOT

SERVERS = list(yaml.safe_load_all((K8S / "servers/servers.yaml").read_text(encoding="utf-8")))
GIVEN = {
    "OWNER_URL": "postgresql://owner:pw@db.example.com:5432/espalier?sslmode=require",
    "REDIS_URL": "rediss://:it's@redis.example.com:6379/0",
    "S3_ACCESS_KEY": "AKIA",
    "S3_SECRET_KEY": "''s'ecret'",
}


def secrets(*arguments: str, **env: str) -> dict[str, dict[str, str]]:
    printed = yaml.safe_load_all(print_secrets(*arguments, **env))
    return {each["metadata"]["name"]: each["stringData"] for each in printed if each}


def refusal(*arguments: str, **env: str) -> str:
    with pytest.raises(subprocess.CalledProcessError) as error:
        print_secrets(*arguments, **env)
    assert error.value.stdout == ""
    (line,) = error.value.stderr.splitlines()
    return str(line)


def recording_programs(place: Path, *, log: Path) -> str:
    """Return a PATH whose programs write down what they were called with."""
    for name in (each.name for each in Path("/usr/bin").iterdir()):
        program = place / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >> {log}\nexec /usr/bin/{name} "$@"\n')
        program.chmod(0o755)
    return str(place)


def test_every_role_has_a_password_of_its_own_and_the_owners_stays_with_the_owner() -> None:
    made = secrets(**GIVEN)
    owners = made.pop("espalier-owner")
    roles = ("api", "schedule", "worker", "scaler")
    passwords = [owners[f"{role}-password"] for role in roles]
    assert len({*passwords, "pw"}) == len(roles) + 1
    for role, password in zip(roles, passwords, strict=True):
        url = made[f"espalier-{role}"]["connection" if role == "scaler" else "database-url"]
        assert url == GIVEN["OWNER_URL"].replace("owner:pw", f"espalier_{role}:{password}")
    assert owners["owner-database-url"] == GIVEN["OWNER_URL"]
    assert made["espalier-s3"] == {"s3-access-key": "AKIA", "s3-secret-key": "''s'ecret'"}
    assert made["espalier-api"]["redis-url"] == GIVEN["REDIS_URL"]


def test_no_program_gets_a_secret_as_an_argument(tmp_path: Path) -> None:
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    path = recording_programs(programs, log=log)
    made = secrets(PATH=path, **GIVEN)
    secrets("--operator-key", PATH=path, OPERATOR_KEY="esp_oper_x")
    called = log.read_text(encoding="utf-8")
    assert called.count("od ") == 4
    values = [*made["espalier-owner"].values(), *GIVEN.values(), "esp_oper_x", "pw@"]
    assert not [value for value in values if value in called]


def test_the_key_of_keda_has_a_secret_of_its_own_and_draws_no_password() -> None:
    made = secrets("--operator-key", OPERATOR_KEY="esp_oper_x")
    assert made == {"espalier-operator-key": {"operator-key": "esp_oper_x"}}
    assert "OPERATOR_KEY" in refusal("--operator-key")
    assert "--operator-key" in refusal(**GIVEN, OPERATOR_KEY="esp_oper_x")
    assert "--operator-key" in refusal("esp_oper_x", **GIVEN)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://db.example.com/espalier",
        "postgresql://owner@db.example.com/espalier",
        "postgresql://owner:@db.example.com/espalier",
        "postgresql://:pw@db.example.com/espalier",
        "postgresql://owner:p@w@db.example.com/espalier",
        "postgresql://owner:p/w@db.example.com/espalier",
        "postgresql://owner:pw@db.example.com/espalier?user=owner",
        "postgresql://owner:pw@db.example.com/espalier?sslmode=require&password=pw",
        "postgresql://db.example.com/espalier?options=a:b@c",
        "owner:pw@db.example.com",
    ],
)
def test_an_owners_url_whose_login_cannot_be_replaced_is_refused(url: str) -> None:
    assert "OWNER_URL must be" in refusal(**{**GIVEN, "OWNER_URL": url})


def test_minio_writes_to_its_mounts_alone() -> None:
    pod: Any = next(each["spec"]["template"]["spec"] for each in SERVERS if "-s3" in each["metadata"]["name"])
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    options = dict(zip(container["args"][2::2], container["args"][3::2], strict=True))
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    for directory in (container["args"][1], options["--config-dir"], options["--certs-dir"]):
        assert {str(path) for path in (Path(directory), *Path(directory).parents)} & writable


def test_prometheus_finds_the_pods_that_it_may_ask() -> None:
    (scrape,) = yaml.safe_load((ROOT / "deploy/prometheus/kubernetes.yml").read_text(encoding="utf-8"))[
        "scrape_configs"
    ]
    kept = {
        rule["source_labels"][0]: rule["regex"] for rule in scrape["relabel_configs"] if rule.get("action") == "keep"
    }
    policies = yaml.safe_load_all((K8S / "control/network-policies.yaml").read_text(encoding="utf-8"))
    (policy,) = (each["spec"] for each in policies if each["metadata"]["name"] == "espalier-metrics")
    (names,) = (each["values"] for each in policy["podSelector"]["matchExpressions"])
    assert kept["__meta_kubernetes_pod_label_app_kubernetes_io_name"] == f"({'|'.join(names)})"
    (port,) = (each["port"] for each in policy["ingress"][0]["ports"])
    assert kept["__meta_kubernetes_pod_container_port_name"] == port
    jobs = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert [each["job_name"] for each in jobs] == names
