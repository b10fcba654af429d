"""docs/errors.md has every code of the code base in its right table, and equals the output of its module."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar

import pytest

from api.errors import HTTP_CODES, STATUSES, status_of
from core.domain import errors
from core.domain.errors import DomainError
from docs import error_codes

ROOT = Path(__file__).resolve().parents[2]
N = TypeVar("N", bound=ast.AST)
ROOMS = ("api", "core", "worker", "schedule", "local", "cli")
# Where the code of an error that is there already is passed on.
PASSED_ON = {
    ("api/auth.py", "refusal.code"),
    ("api/connections.py", "self.code"),
    ("api/errors.py", "code"),
    ("api/errors.py", "error.code"),
    ("api/row_checks.py", "found.code"),
    ("core/domain/datasets/refusals.py", "code"),
    ("core/telemetry/readiness.py", "self._need.code"),
    ("worker/supervisor/records.py", "report.code"),
}


@cache
def tree(path: Path) -> ast.Module:
    """Return a module, each of whose nodes knows where it is."""
    module = ast.parse(path.read_text())
    for node in ast.walk(module):
        node.where = str(path.relative_to(ROOT))  # type: ignore[attr-defined]
    return module


def nodes(kind: type[N], *rooms: str) -> Iterator[N]:
    for path in (each for room in rooms for each in sorted((ROOT / room).rglob("*.py"))):
        yield from (node for node in ast.walk(tree(path)) if isinstance(node, kind))


def called(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((each.value for each in call.keywords if each.arg == name), None)


@cache
def constants() -> dict[str, str]:
    """Text that a module gives a name in capitals. A code may be one."""
    return {
        node.targets[0].id: node.value.value
        for node in nodes(ast.Assign, *ROOMS)
        if isinstance(node.targets[0], ast.Name)
        and node.targets[0].id.isupper()
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def texts(node: ast.expr | None) -> set[str]:
    """The codes that an expression may stand for; none where it passes one on."""
    match node:
        case ast.Constant(value=str(code)):
            return {code}
        case ast.Name(id=name) if name in constants():
            return {constants()[name]}
        case ast.JoinedStr():
            gates = [str(call.args[0].value) for call in nodes(ast.Call, "api") if called(call) == "Gate"]  # type: ignore[attr-defined]
            return {
                "".join(
                    getattr(part, "value", gate) if isinstance(part, ast.Constant) else gate for part in node.values
                )
                for gate in gates
            }
        case None:
            return set()
    place = (node.where, ast.unparse(node))  # type: ignore[attr-defined]
    assert place in PASSED_ON, f"a code that is computed: {place}"
    return set()


def kinds(kind: type[DomainError] = DomainError) -> Iterator[type[DomainError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from kinds(child)


def raised() -> Iterator[tuple[str, int]]:
    """Each code that a domain error has, and the status of its answer."""
    by_name = {kind.__name__: kind for kind in kinds()}
    for kind in by_name.values():
        yield kind.default_code, status_of(kind("."))
    for call in nodes(ast.Call, *ROOMS):
        if (raising := by_name.get(called(call))) is not None:
            yield from ((code, status_of(raising("."))) for code in texts(keyword(call, "code")))


def answered() -> Iterator[tuple[str, int]]:
    """Each code that is answered without a domain error."""
    for call in nodes(ast.Call, "api"):
        if called(call) in {"error_answer", "error_body"}:
            codes = texts(keyword(call, "code"))
            assert not codes or isinstance(call.args[0], ast.Constant), f"line {call.lineno}: a status that is computed"
            yield from ((code, int(ast.unparse(call.args[0]))) for code in codes)
        if called(call) == "Refusal" and isinstance(call.args[1], ast.Constant):
            yield str(call.args[1].value), HTTPStatus[ast.unparse(call.args[0]).rpartition(".")[2]]
    for status, code in HTTP_CODES.items():
        yield code, status


def http_codes() -> dict[str, set[int]]:
    found: dict[str, set[int]] = defaultdict(set)
    for code, status in (*raised(), *answered()):
        found[code].add(status)
    return found


def failures() -> Iterator[str]:
    """The codes of attempts: of error classes and failures, and of what is written into a row."""
    for class_ in nodes(ast.ClassDef, "worker"):
        for line in class_.body:
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "code":
                yield from texts(line.value)
            if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == "code":
                yield from texts(line.value)
    for call in nodes(ast.Call, *ROOMS):
        yield from texts(keyword(call, "code")) if called(call) == "Failure" else ()
    for mapping in nodes(ast.Dict, "core/services"):
        pairs = zip(mapping.keys, mapping.values, strict=True)
        yield from (code for key, value in pairs if texts_of_key(key) == "code" for code in constant(value))
    for returned in nodes(ast.Return, "worker/trainer"):
        if isinstance(returned.value, ast.Tuple) and isinstance(returned.value.elts[-1], ast.Constant):
            yield from constant(returned.value.elts[0])


def texts_of_key(key: ast.expr | None) -> str:
    return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else ""


def constant(node: ast.expr) -> set[str]:
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def problems() -> Iterator[str]:
    places = {"refuse": 1, "RefusalError": 1, "Problem": 2}
    for call in nodes(ast.Call, "api", "core"):
        if (place := places.get(called(call))) is None:
            continue
        node = keyword(call, "code") or next(iter(call.args[place : place + 1]), None)
        is_passed_on = node is not None and ast.unparse(node).startswith(("refusal.", "self."))
        yield from () if is_passed_on else texts(node)


def listed(rows: Iterable[error_codes.Answer | error_codes.JobFailure | error_codes.RowProblem]) -> set[str]:
    return {row.code for row in rows}


def test_every_code_of_an_http_answer_stands_in_its_table() -> None:
    assert len(http_codes()) > 60
    assert set(http_codes()) - listed(error_codes.ANSWERS) - set(error_codes.INTERNAL) == set()


@pytest.mark.parametrize("row", error_codes.ANSWERS, ids=lambda row: row.code)
def test_an_answer_has_the_status_of_the_code(row: error_codes.Answer) -> None:
    # What passes on the code of a row's problem is a request that is refused.
    known = http_codes().get(row.code) or {STATUSES[errors.InvalidRequestError]}
    assert row.status == "any other" or {int(status) for status in re.findall(r"\d+", row.status)} == known


def test_every_code_of_a_failed_attempt_stands_in_its_table() -> None:
    found = set(failures())
    assert len(found) > 20
    assert found - listed(error_codes.JOB_FAILURES) - set(error_codes.INTERNAL) == set()


def test_every_code_of_a_file_check_stands_in_its_table() -> None:
    assert set(problems()) == listed(error_codes.ROW_PROBLEMS)


def test_no_code_hides_behind_a_default_another_name_or_an_answer_of_its_own() -> None:
    """What the walks above cannot see is not written: `code="x"` of a parameter, a renamed error, a JSONResponse."""
    hidden = [
        f"{function.where}: {argument.arg} of {function.name}"  # type: ignore[attr-defined]
        for function in nodes(ast.FunctionDef, *ROOMS)
        for argument, default in defaults(function.args)
        if argument.arg == "code" and constant(default)
    ]
    names = {kind.__name__ for kind in kinds()} | {"Failure", "refuse"}
    hidden += [
        f"{node.where}: {ast.unparse(node)}"  # type: ignore[attr-defined]
        for node in nodes(ast.Assign, *ROOMS)
        if getattr(node.value, "id", "") in names
    ]
    hidden += [
        f"{node.where}: {ast.unparse(node)}"  # type: ignore[attr-defined]
        for node in nodes(ast.ImportFrom, *ROOMS)
        if any(alias.name in names and alias.asname for alias in node.names)
    ]
    hidden += [
        f"{call.where}: {ast.unparse(call)}"  # type: ignore[attr-defined]
        for call in nodes(ast.Call, "api")
        if called(call) == "JSONResponse" and call.where != "api/errors.py"  # type: ignore[attr-defined]
    ]
    assert hidden == []


def defaults(arguments: ast.arguments) -> Iterator[tuple[ast.arg, ast.expr]]:
    given = [*arguments.posonlyargs, *arguments.args]
    yield from zip(reversed(given), reversed(arguments.defaults), strict=False)
    yield from (
        (arg, default) for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default
    )


@pytest.mark.parametrize("table", ["ANSWERS", "JOB_FAILURES", "ROW_PROBLEMS"])
def test_a_table_has_no_code_twice_and_is_in_order(table: str) -> None:
    codes = [row.code for row in getattr(error_codes, table)]
    assert codes == sorted(set(codes))


def test_the_page_has_no_code_that_is_nowhere_else() -> None:
    gone = listed(error_codes.ANSWERS) - set(http_codes()) - {"http_error", "template_refused"}
    assert gone == set()
    in_code = {node.value for node in nodes(ast.Constant, "api", "core", "worker") if isinstance(node.value, str)}
    assert (listed(error_codes.JOB_FAILURES) | set(error_codes.INTERNAL)) - in_code == set()


def test_the_page_is_what_its_module_prints() -> None:
    assert (ROOT / "docs/errors.md").read_text() == error_codes.render_page()


def test_links_of_the_page_lead_to_a_heading() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}
    assert set(re.findall(r"operations\.md#([\w-]+)", error_codes.render_page())) <= anchors
