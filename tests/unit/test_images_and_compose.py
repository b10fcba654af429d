"""The Dockerfile and docker-compose.yml, read without an engine. tests/deploy/ executes them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.__main__ import main
from tests.deploy.engine import BASE_IMAGE, ROOT
from tests.deploy.wheelhouse import TORCH

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("bucket", "migrate", "operator", "api", "schedule", "worker", "worker-gpu")
ENDING = ("bucket", "migrate", "operator")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
CONSTRAINTS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())


def test_the_images_take_the_torch_of_the_constraints() -> None:
    wanted = CONSTRAINTS["torch"]
    assert re.findall(r"torch==([0-9.]+)", DOCKERFILE) == [wanted, wanted]
    assert f"torch=={wanted}+cpu" == TORCH


def test_where_no_engine_can_start_the_checks_say_so_in_one_line_and_have_linted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["images", "pods"]) == 0
    linted, said = capsys.readouterr().out.splitlines()
    assert linted.startswith("hadolint: Dockerfile")
    assert said == "No container engine can start here (it takes root on Linux): not executed: images, pods."


def test_a_check_that_does_not_exist_is_refused() -> None:
    assert main(["pod"]) == 2


def test_every_stage_stands_on_one_base_and_runs_as_nobody_special() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    names = [name for _, name in stages]
    assert [base for base, _ in stages if base not in names] == [BASE_IMAGE]
    for target in ("control", "worker-cpu", "worker-cuda"):
        stage = DOCKERFILE.partition(f"FROM runtime AS {target}\n")[2].partition("\nFROM ")[0]
        assert "USER 10001:10001" in stage
        assert 'ENTRYPOINT ["/usr/bin/tini", "--"]' in stage
        assert "HEALTHCHECK" in stage
        assert "org.opencontainers.image.revision" in stage


def test_old_engines_build_it() -> None:
    assert not re.search(r"^# *syntax *=", DOCKERFILE, re.MULTILINE)
    assert "<<" not in DOCKERFILE
    assert not re.search(r"^COPY .*--link", DOCKERFILE, re.MULTILINE)


def test_a_builder_is_sent_the_sources_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert lines[0] == "*"
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert sent == rooms | {"LICENSE", "README.md", "constraints.txt", "deploy/images", "pyproject.toml"}


@pytest.mark.parametrize("name", OURS)
def test_our_services_run_within_walls(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert not service.get("cap_add")
    assert not service.get("user"), "the image's own"
    assert not service.get("privileged")


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_has_limits_and_gains_no_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["mem_limit"]
    assert service["restart"] == ("no" if name in ENDING else "unless-stopped")
    assert all(port.startswith("${ESPALIER_COMPOSE_BIND:-127.0.0.1}:") for port in service.get("ports", ()))


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_an_image_is_a_variable_with_a_pinned_default(name: str) -> None:
    match = re.fullmatch(
        r"\$\{ESPALIER_COMPOSE_[A-Z0-9_]+_IMAGE:-(?P<image>[^}]+):(?P<tag>[^:}]+)\}", SERVICES[name]["image"]
    )
    assert match
    is_ours = match["image"].startswith("espalier-")
    assert (match["tag"] == "latest") == is_ours  # ours is built here, others' are pulled


def test_no_secret_has_a_default_or_stands_in_an_environment() -> None:
    for secret in COMPOSE["secrets"].values():
        assert re.match(r"\$\{ESPALIER_COMPOSE_SECRETS:\?", secret["file"])
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|ACCESS_KEY|DATABASE_URL|REDIS_URL|ROOT_USER", variable):
                assert value.startswith("/run/secrets/")
                assert value.removeprefix("/run/secrets/") in service["secrets"]


def test_each_service_gets_the_secrets_that_it_uses_and_no_more() -> None:
    for service in SERVICES.values():
        words = yaml.safe_dump({key: value for key, value in service.items() if key != "secrets"})
        assert {name for name in service.get("secrets", ()) if f"/run/secrets/{name}" not in words} == set()


def test_operators_commands_have_a_place_that_nothing_starts_and_that_starts_nothing() -> None:
    operator = SERVICES["operator"]
    assert operator["profiles"] == ["operator"]
    assert not operator.get("depends_on")
    assert not [name for name, service in SERVICES.items() if "operator" in service.get("depends_on", {})]


def test_the_place_for_operators_commands_has_all_that_they_read() -> None:
    """What a process of the service is told of its servers, with the owner's URL for its own, and where the API is."""
    shared = ("ESPALIER_S3_", "ESPALIER_REDIS_")
    wanted = {name: value for name, value in SERVICES["api"]["environment"].items() if name.startswith(shared)} | {
        "ESPALIER_OWNER_DATABASE_URL_FILE": "/run/secrets/owner_database_url",
        "ESPALIER_API_URL": "http://api:8000",
    }
    assert SERVICES["operator"]["environment"] == wanted
    servers = ("postgres", "redis", "s3", "api")
    assert all(set(SERVICES["operator"]["networks"]) & set(SERVICES[name]["networks"]) for name in servers)


def test_every_secret_is_made_by_the_command_and_kept_by_it(tmp_path: Path) -> None:
    shell = shutil.which("sh")
    assert shell
    script = ROOT / "deploy/compose/make-secrets.sh"
    subprocess.run([shell, script, tmp_path / "secrets"], check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert set(made) == set(COMPOSE["secrets"])
    assert len(set(made.values())) == len(made)
    assert made["api_password"] in made["api_database_url"]
    subprocess.run([shell, script, tmp_path / "secrets"], check=True)
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == made
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["api", "schedule", "worker", "worker-gpu"])
def test_a_long_running_service_of_ours_waits_for_its_servers_and_says_how_it_is(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"] == ["CMD", "python", "-m", "core.telemetry.health"]
    waits = {other: how["condition"] for other, how in service["depends_on"].items()}
    assert waits == {
        "migrate": "service_completed_successfully",
        "bucket": "service_completed_successfully",
        "postgres": "service_healthy",
        "redis": "service_healthy",
    }
    assert int(service["stop_grace_period"].removesuffix("s")) > 15


def test_what_env_example_sets_is_what_compose_asks_for() -> None:
    asked = set(re.findall(r"ESPALIER_COMPOSE_[A-Z0-9_]+", (ROOT / "docker-compose.yml").read_text(encoding="utf-8")))
    named = set(re.findall(r"ESPALIER_COMPOSE_[A-Z0-9_]+", (ROOT / ".env.example").read_text(encoding="utf-8")))
    assert named <= asked
    must = set(re.findall(r"\$\{(ESPALIER_COMPOSE_[A-Z0-9_]+):\?", (ROOT / "docker-compose.yml").read_text("utf-8")))
    assert must <= named
