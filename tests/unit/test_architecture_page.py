"""The architecture page names every thread and status of the code, and its pictures can be read by Mermaid."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.domain.jobs import AttemptOutcome, JobStatus
from tests.mermaid import blocks_of, find_faults

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
ROOMS = ("api", "core", "worker", "schedule", "local", "cli")
STARTERS = {"Thread", "_VitalThread", "start_thread", "ThreadPoolExecutor"}
NAMING = {"name", "thread_name_prefix"}


def _calls(path: Path, names: set[str]) -> Iterator[ast.Call]:
    yield from _calls_in(path.read_text(), names)


def _calls_in(source: str, names: set[str]) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        if getattr(called, "id", getattr(called, "attr", None)) in names:
            yield node  # type: ignore[misc]


def _texts(node: ast.AST) -> set[str]:
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def _computed(path: Path) -> set[str]:
    """The names that a variable may stand for: of duties, of needs, or of a table that a loop goes through."""
    named = {text for call in _calls(path, {"add_duty"}) for text in _texts(call.args[0])}
    loops = [node.iter for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.For)]
    rows = [row for table in loops if isinstance(table, ast.Tuple) for row in table.elts if isinstance(row, ast.Tuple)]
    return {text for row in rows for text in _texts(row.elts[0])} or named


def _sources() -> Iterator[Path]:
    return (each for room in ROOMS for each in sorted((ROOT / room).rglob("*.py")))


def _names_of_timers(source: str) -> list[str]:
    """What a module assigns to the names of its timers: a timer takes no name when it is made."""
    assigned = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)]
    return [text for node in assigned if ast.unparse(node.targets[0]) == "timer.name" for text in _texts(node.value)]


def _unnamed(source: str) -> list[int]:
    """The lines that start a thread or a pool of threads without a name."""
    calls = _calls_in(source, STARTERS)
    unnamed = [call.lineno for call in calls if not any(keyword.arg in NAMING for keyword in call.keywords)]
    timers = [call.lineno for call in _calls_in(source, {"Timer"})]
    return sorted(unnamed + timers[len(_names_of_timers(source)) :])


def threads() -> Iterator[tuple[str, str]]:
    """Each name of a thread, and where it is started. Of a name that is made of parts, the fixed one."""
    for path in _sources():
        yield from ((name, str(path.relative_to(ROOT))) for name in _names_of_timers(path.read_text()))
        for call in _calls(path, STARTERS):
            for keyword in (each for each in call.keywords if each.arg in NAMING):
                is_fixed = isinstance(keyword.value, ast.Constant | ast.JoinedStr)
                for name in _texts(keyword.value) if is_fixed else _computed(path):
                    yield name, f"{path.relative_to(ROOT)}:{call.lineno}"


def test_the_page_names_every_thread_of_the_code() -> None:
    found = list(threads())
    assert len({name for name, _ in found}) > 15
    assert [each for each in found if not re.search(rf"`{re.escape(each[0])}", PAGE)] == []


def test_every_thread_of_the_code_has_a_name() -> None:
    assert {str(path.relative_to(ROOT)): lines for path in _sources() if (lines := _unnamed(path.read_text()))} == {}


def test_a_thread_without_a_name_is_found() -> None:
    assert _unnamed("threading.Thread(target=work)\nThread(target=work, name='a')") == [1]
    assert _unnamed("ThreadPoolExecutor(thread_name_prefix='a')\nThreadPoolExecutor(4)") == [2]
    assert _unnamed("timer = Timer(1, work)\ntimer.name = 'a'\nTimer(1, work)") == [3]


def test_the_page_names_every_module_that_limits_threads() -> None:
    limiting = [str(path.relative_to(ROOT)) for path in _sources() if any(_calls(path, {"CapacityLimiter"}))]
    assert "api/row_checks.py" in limiting
    assert [module for module in limiting if f"`{module}`" not in PAGE] == []


def test_the_needs_of_readiness_are_threads_of_the_page() -> None:
    needs = {call.args[0].value for call in _calls(ROOT / "core/services/readiness.py", {"Need"})}  # type: ignore[attr-defined]
    assert needs == {"database", "object store"}
    assert all(f"`{need}`" in PAGE for need in needs)


def test_the_page_names_no_thread_that_is_not_in_the_code() -> None:
    section = PAGE.split("## The threads")[1].split("## Data path 1")[0]
    fixed = {
        match for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for match in re.findall(r"`(.+?)`", row)
    }
    names = {name for name, _ in threads()} | {"database", "object store"}
    assert [shown for shown in fixed if not any(shown.startswith(name) for name in names)] == []


@pytest.mark.parametrize("status", list(JobStatus))
def test_the_page_has_every_status_in_its_table_and_its_picture(status: JobStatus) -> None:
    assert f"| `{status}` |" in PAGE.split("| status | means")[1].split("\n\n")[0]
    pictures = [block for block in blocks_of(PAGE) if block.startswith("stateDiagram")]
    assert status == JobStatus.VALIDATING_FILES or re.search(rf"\b{status}\b", pictures[0])


@pytest.mark.parametrize("outcome", list(AttemptOutcome))
def test_the_page_says_what_follows_each_outcome(outcome: AttemptOutcome) -> None:
    assert re.search(rf"^\| `{outcome}`", PAGE.split("| outcome of the attempt")[1], re.MULTILINE)


PAGES = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_pictures_can_be_drawn(page: Path) -> None:
    assert [fault for block in blocks_of(page.read_text()) for fault in find_faults(block)] == []


def test_a_picture_with_a_fault_is_found() -> None:
    assert find_faults("flowchart LR\n    a --> b[open") == ["line 2: 'a --> b[open'"]
    assert find_faults("flowchart LR\n    subgraph x\n    a --> b") == ["subgraph or loop without its end"]
    assert find_faults("pie\n    a --> b") == ["no kind of picture that is known: 'pie'"]
    assert find_faults("stateDiagram-v2\n    a -> b") == ["line 2: 'a -> b'"]
    assert find_faults("sequenceDiagram\n    participant A\n    A->>B: hello") == ["line 3: B is no participant"]
