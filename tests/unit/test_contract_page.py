"""The contract page names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_the_contract_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/contract.md").read_text()))
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(named) > 20
    assert named - defined == set()
