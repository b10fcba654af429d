"""A valid invocation of every command, and its output on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
import yaml
from sqlalchemy import Engine
from typer.testing import Result

from cli.main import app, walk_commands
from core.db.session import operator_transaction
from core.services.operators import issue_operator_key
from tests.factories.bases import BASE_MODEL, REGISTRY
from tests.factories.tenants import Tenant

ROOT = Path(__file__).resolve().parents[3]
MAX_COLUMNS = 100
LONG = "SomeOrganisation/A-Model-With-A-Rather-Long-Name-70B-Instruct-2026@none"
ROW = '{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}'
Espalier = Callable[..., Result]


def names_of_commands() -> set[str]:
    """Return every command as it is typed, groups included."""
    found = set()
    for each in app.registered_commands:
        found.add(str(each.name))
    for group in app.registered_groups:
        assert isinstance(group.typer_instance, typer.Typer)
        found |= {f"{group.name} {each.name}" for each in walk_commands(group.typer_instance)}
    return found


def invocations(tmp_path: Path, owner: Engine, tenant: Tenant) -> dict[str, tuple[str, ...]]:
    """Return how each command is called here. What cannot be done here ends with an error, which is said as JSON, too."""
    registry, rows = tmp_path / "registry.yaml", tmp_path / "rows.jsonl"
    registry.write_text(yaml.safe_dump(REGISTRY))
    rows.write_text(ROW)
    with operator_transaction(owner, actor="test") as session:
        operator_key_id = str(issue_operator_key(session, name="to-be-revoked")).split("_")[2]
    here = ("--data-dir", str(tmp_path / "data"))
    slug = tenant.slug
    return {
        "up": ("--registry", str(tmp_path / "not-a-registry.yaml")),
        "down": here,
        "status": here,
        "demo": ("--data-dir", "/proc/nowhere"),
        "migrate": ("--registry", str(registry)),
        "audit": ("--limit", "5"),
        "check-contract": (),
        "set-asides": (),
        "validate": (str(rows),),
        "jobs": (),
        "workers": (),
        "pools": (),
        "usage": (),
        "top": (),
        "doctor": (),
        "bucket create": here,
        "s3-check": ("nowhere",),
        "tenants create": (f"made-{slug[:20]}",),
        "tenants delete": (f"made-{slug[:20]}", "--yes"),
        "tenants list": (),
        "tenants set": (slug, "--weight", "2"),
        "tenants disable": (slug,),
        "tenants enable": (slug,),
        "keys create": (slug,),
        "keys list": (slug,),
        "keys rotate": (slug, "test"),
        "keys revoke": (tenant.key_id,),
        "base-models list": (),
        "base-models add": ("acme/none", "--source", f"path:{tmp_path}/none"),
        "base-models check": ("acme/none",),
        "base-models remove": (BASE_MODEL,),
        "base-models disable": (BASE_MODEL,),
        "base-models enable": (BASE_MODEL,),
        "operators create": ("olga",),
        "operators list": (),
        "operators revoke": (operator_key_id,),
    }


def documents_of(told: str) -> list[dict[str, Any]]:
    """Return the JSON that a command has printed: one object a line, which one document is, too."""
    found = [json.loads(line) for line in told.splitlines()]
    assert all(isinstance(each, dict) for each in found)
    return found


def read_terminal(
    words: list[str], env: dict[str, str], num_columns: int, *, typed: str = "", exit_code: int = 0
) -> list[str]:
    """Return the lines that a command shows on a terminal of so many columns, where something is typed."""
    terminal, theirs = pty.openpty()
    here = {**os.environ, **env, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": str(num_columns)}
    argv = [sys.executable, "-m", "cli", *words]
    with subprocess.Popen(argv, cwd=ROOT, env=here, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.write(terminal, typed.encode())
        seen = drain(terminal)
        assert process.wait() == exit_code, seen
    os.close(terminal)
    return re.sub(r"\x1b\[[0-9;]*m", "", seen.decode()).splitlines()


def drain(terminal: int) -> bytes:
    seen = b""
    try:
        while read := os.read(terminal, 65536):
            seen += read
    except OSError:  # the other side is closed
        pass
    return seen
