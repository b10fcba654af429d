"""The contract page names tests that exist, and its table of faults every test that is marked as a row of it."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/contract.md").read_text()
# Strikes at random, for as long as it is told to.
CHAOS = 55


def functions_of_tests() -> Iterator[ast.FunctionDef]:
    for path in (ROOT / "tests").rglob("test_*.py"):
        yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


def rows_of(test: ast.FunctionDef) -> list[int]:
    """Return the rows of the table that a test is marked with."""
    marks = [each for each in test.decorator_list if ast.unparse(each).startswith("pytest.mark.fault")]
    return [int(row) for mark in marks if isinstance(mark, ast.Call) for row in map(ast.unparse, mark.args)]


def test_every_test_that_the_contract_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    defined = {test.name for test in functions_of_tests()}
    assert len(named) > 20
    assert named - defined == set()


def test_the_table_of_faults_names_the_tests_that_are_marked_with_its_rows_and_no_other() -> None:
    table = PAGE.partition("## Faults")[2].partition("These rows are not covered")[0]
    named = {
        int(row): set(re.findall(r"`(test_\w+)`", told))
        for row, told in re.findall(r"^\| (\d+) \|(.*)$", table, re.MULTILINE)
    }
    marked: dict[int, set[str]] = defaultdict(set, {CHAOS: set()})
    for test in functions_of_tests():
        for row in rows_of(test):
            marked[row].add(test.name)
    assert len(named) > 40
    assert marked == named


def test_a_test_that_has_a_row_in_its_name_is_marked_with_it() -> None:
    numbered = {
        test.name: (test, re.findall(r"^test_(?:row_)?(\d+)_(?:(\d+)_)?", test.name)) for test in functions_of_tests()
    }
    wrong = {
        name: rows_of(test)
        for name, (test, found) in numbered.items()
        if found and rows_of(test) != [int(row) for row in found[0] if row]
    }
    assert not wrong
