"""House rules that reviewers would otherwise have to repeat."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.db import models

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("api", "core", "worker", "schedule", "local", "cli")
FORBIDDEN_PARTS = {"utils", "helpers", "common", "misc", "manager", "handler", "processor", "do"}
LIBRARY_NAMES = {"get_route_handler"}  # FastAPI's, which we override
PLACES = (*ROOMS, "bench", "deploy", "docs", "examples", "migrations", "tests")
MAX_FUNCTION_LINES = 40
MAX_FILE_LINES = 400
MAX_METHODS = 25
PATIENT_SECONDS = 60
CLOCKS = {"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "sleep"}
WAITS = {"wait", "join", "result", "communicate", "receive", "select"}  # whose bound may stand without a name


def sources() -> Iterator[Path]:
    for room in ROOMS:
        yield from sorted((ROOT / room).rglob("*.py"))


SOURCES = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in sources()]


def walk(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


# All that is ours, beside the rooms too.
MODULES = [
    pytest.param(path, id=str(path.relative_to(ROOT)))
    for place in PLACES
    for path in sorted((ROOT / place).rglob("*.py"))
]


@pytest.mark.parametrize("path", MODULES)
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", SOURCES)
def test_only_the_session_module_commits(path: Path) -> None:
    if path == ROOT / "core/db/session.py":
        return
    calls = [node for node in walk(path) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert not [call.lineno for call in calls if call.func.attr == "commit"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", SOURCES)
def test_nothing_catches_everything(path: Path) -> None:
    handlers = [node for node in walk(path) if isinstance(node, ast.ExceptHandler)]
    broad = [node.lineno for node in handlers if node.type is None or getattr(node.type, "id", "") == "Exception"]
    assert not broad


DATABASE_IS_AWAY = {"OperationalError", "InterfaceError", "InternalError", "TimeoutError"}
# The kinds of these and of errors of a row or of our own: too much to catch, but for who tells them apart.
ALL_DATABASE_ERRORS = {"DBAPIError", "DatabaseError", "SQLAlchemyError", "Error"}
TELLING_THEM_APART = {
    "cli/commands/promises.py",
    "cli/doctor/database.py",
    "cli/reporting.py",
    "core/database_urls.py",
    "core/services/set_asides.py",
    "local/external.py",
}
DATABASE_LIBRARIES = ("sqlalchemy", "psycopg")
CONNECTING = {"core/db/session.py", "core/db/connections.py"}


@pytest.mark.parametrize("path", [each for each in SOURCES if each.id != "core/db/session.py"])
def test_that_the_database_is_away_has_one_name(path: Path) -> None:
    """Code that catches one of its errors must catch all of them: DATABASE_ERRORS, which core/db/session.py makes."""
    refused = DATABASE_IS_AWAY | (set() if str(path.relative_to(ROOT)) in TELLING_THEM_APART else ALL_DATABASE_ERRORS)
    assert not [f"line {line}: {name}" for line, name in taken_from_database_libraries(path) if name in refused]
    renamed = [
        node.lineno
        for node in walk(path)
        if (isinstance(node, ast.Assign | ast.AnnAssign) and getattr(node.value, "id", "") == "DATABASE_ERRORS")
        or (isinstance(node, ast.alias) and node.name == "DATABASE_ERRORS" and node.asname is not None)
    ]
    assert not renamed


@pytest.mark.parametrize("path", [each for each in SOURCES if each.id not in CONNECTING])
def test_only_two_modules_connect_to_the_database(path: Path) -> None:
    """A connection that was made without their arguments waits for minutes for a server that has vanished."""
    taken = [(line, name) for line, name in taken_from_database_libraries(path) if name in {"connect", "create_engine"}]
    assert not [f"line {line}: {name}" for line, name in taken]


BARE_SESSIONS = {"Session", "Connection", "sessionmaker", "scoped_session"}
TAKING_ANY_SESSION = {
    "core/db/session.py",  # makes the kinds of sessions, and sends what any of them has to tell
    "core/db/connections.py",  # makes psycopg's connections, and listens on one
    "core/db/locks.py",  # a lock is a name: it needs no right to any row
}


@pytest.mark.parametrize("path", [each for each in SOURCES if each.id not in TAKING_ANY_SESSION])
def test_the_type_of_a_session_says_which_role_it_has(path: Path) -> None:
    """The kinds are in core/db/session.py. SQLAlchemy's own Session does not say whose rows it sees."""
    taken = [(line, name) for line, name in taken_from_database_libraries(path) if name in BARE_SESSIONS]
    assert not [f"line {line}: {name}" for line, name in taken]


def taken_from_database_libraries(path: Path) -> Iterator[tuple[int, str]]:
    """Yield what a module imports from these libraries, and what it names behind a dot of what it imported."""
    tree = list(walk(path))
    of_libraries = {
        (alias.asname or alias.name).partition(".")[0]
        for node in tree
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).startswith(DATABASE_LIBRARIES)
    }
    for node in tree:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(DATABASE_LIBRARIES):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and root_of(node) in of_libraries:
            yield node.lineno, node.attr


def root_of(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return getattr(node, "id", "")


@pytest.mark.parametrize("path", SOURCES)
def test_names_say_what_things_are(path: Path) -> None:
    named = [node.name for node in walk(path) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    own = {path.stem, *named} - LIBRARY_NAMES
    words = {word for name in own for word in name.lower().strip("_").split("_")}
    assert not words & FORBIDDEN_PARTS


@pytest.mark.parametrize("path", SOURCES)
def test_functions_fit_on_a_screen(path: Path) -> None:
    functions = [node for node in walk(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno}
    assert not {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES}


@pytest.mark.parametrize("path", MODULES)
def test_a_class_is_one_thing(path: Path) -> None:
    """A state machine of hypothesis is one class, with a method for each rule."""
    classes = [node for node in walk(path) if isinstance(node, ast.ClassDef)]
    classes = [c for c in classes if "RuleBasedStateMachine" not in {getattr(base, "id", "") for base in c.bases}]
    methods = {
        c.name: sum(isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) for each in c.body) for c in classes
    }
    assert not {name: count for name, count in methods.items() if count > MAX_METHODS}


def test_a_file_is_read_in_one_sitting() -> None:
    files = [path for place in PLACES for path in (ROOT / place).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: count for name, count in lines.items() if count > MAX_FILE_LINES}


@pytest.mark.parametrize("path", SOURCES)
def test_no_console_makes_emojis_of_what_users_write(path: Path) -> None:
    """`host:abc:` is an address, or was meant to be one."""
    made = [node for node in walk(path) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Console"]
    assert not [call.lineno for call in made if "emoji" not in {keyword.arg for keyword in call.keywords}]


@pytest.mark.parametrize("path", SOURCES)
def test_no_code_or_pickle_of_others_is_ever_run(path: Path) -> None:
    calls = [node for node in walk(path) if isinstance(node, ast.Call)]
    trusting = [k for call in calls for k in call.keywords if k.arg == "trust_remote_code"]
    assert all(isinstance(k.value, ast.Constant) and k.value.value is False for k in trusting)
    imported = {alias.name for node in walk(path) if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & {"pickle", "marshal", "shelve", "dill"}


@pytest.mark.parametrize("path", sorted((ROOT / "api/routes").glob("*.py")), ids=lambda path: path.name)
def test_routes_are_plain_functions(path: Path) -> None:
    if path.name in {"streams.py", "health.py"}:  # an open stream, or a probe, must not hold a thread
        return
    assert not [node for node in walk(path) if isinstance(node, ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", sorted((ROOT / "api").rglob("*.py")), ids=lambda path: path.name)
def test_a_transaction_of_a_tenant_names_who_acts(path: Path) -> None:
    calls = [node for node in walk(path) if isinstance(node, ast.Call)]
    opened = [call for call in calls if getattr(call.func, "id", "") == "tenant_transaction"]
    assert all("actor" in {keyword.arg for keyword in call.keywords} for call in opened), "the audit log wants a name"


TESTS = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path.stem.startswith(("test_", "conftest"))]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_test_reads_no_clock_and_sleeps_for_no_luck(path: Path) -> None:
    """What waits, and what must not be early, stands in tests/waiting.py; how long things take is shown by bench/."""
    called = [node.func for node in walk(path) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    read = [each for each in called if getattr(each.value, "id", "") == "time" and each.attr in CLOCKS]
    assert not [f"line {each.lineno}: time.{each.attr}" for each in read]
    assert "time" not in {node.module for node in walk(path) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_wait_of_a_test_ends_only_what_would_never_end(path: Path) -> None:
    """A bound that a busy machine may pass fails a test for nothing; one that is never passed costs nothing."""
    calls = [node for node in walk(path) if isinstance(node, ast.Call)]
    assert not [f"line {call.lineno}: {seconds} s" for call in calls for seconds in bounds_of(call)]
    assert not [f"line {call.lineno}: httpx waits 5 s if it is not told" for call in calls if is_unbound(call)]


SHARING = [path for room in ("tests", "bench") for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("path", SHARING, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_from_a_module_of_tests(path: Path) -> None:
    """What tests share stands in tests/factories or in a module named for it; fixtures come from a conftest by name."""
    imported = [
        (node.lineno, module)
        for node in walk(path)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in modules_of(node)
    ]
    called = [node for node in walk(path) if isinstance(node, ast.Call)]
    imported += [
        (call.lineno, str(call.args[0].value))
        for call in called
        if getattr(call.func, "attr", getattr(call.func, "id", "")) == "import_module"
        and call.args
        and isinstance(call.args[0], ast.Constant)
    ]
    assert not [f"line {line}: {module}" for line, module in imported if is_of_tests(module)]


def modules_of(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Yield what a statement imports from, and what it imports: either may be a module."""
    for alias in node.names:
        yield f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name


def is_of_tests(module: str) -> bool:
    parts = module.split(".")
    return parts[0] == "tests" and any(part == "conftest" or part.startswith("test_") for part in parts)


def bounds_of(call: ast.Call) -> Iterator[float]:
    """Yield the bounds of a call's wait that are too short. 0 waits for nothing, and may."""
    name = getattr(call.func, "attr", "")
    given = [keyword.value for keyword in call.keywords if keyword.arg and "timeout" in keyword.arg]
    given += call.args[-1:] if name in WAITS else []
    for each in given:
        if isinstance(each, ast.Constant) and isinstance(each.value, int | float) and 0 < each.value < PATIENT_SECONDS:
            yield each.value


def is_unbound(call: ast.Call) -> bool:
    """Return whether a request is sent with httpx' own patience."""
    is_httpx = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "httpx"
    asks = is_httpx and call.func.attr in {"get", "post", "put", "delete", "request", "stream", "Client"}  # type: ignore[attr-defined]
    return asks and "timeout" not in {keyword.arg for keyword in call.keywords}


def test_the_import_contracts_know_every_room() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tool = project["tool"]
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "migrations"}
    assert rooms == set(ROOMS)
    assert rooms == set(tool["importlinter"]["root_packages"]) == set(tool["mypy"]["packages"]) - {"tests", "bench"}
    assert {f"{room}*" for room in rooms} <= set(tool["setuptools"]["packages"]["find"]["include"])


def test_every_module_but_the_trainers_and_the_engines_is_kept_from_torch() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (kept,) = (each["source_modules"] for each in contracts if "torch" in each.get("forbidden_modules", ()))
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources()}
    names = {name.removesuffix(".__init__") for name in names}
    free = {name for name in names if not any(f"{name}.".startswith(f"{room}.") for room in kept)}
    assert {name for name in free if not name.startswith(("worker.trainer", "worker.engine"))} == {
        "worker",  # says what it is, and holds nothing
        "worker.__main__",  # runs worker.supervisor.tasks
    }


def test_every_row_is_loaded_with_its_package_and_called_by_its_noun_alone() -> None:
    rooms = {path.stem for path in (ROOT / "core/db/models").glob("*.py")} - {"__init__"}
    assert {f"core.db.models.{room}" for room in rooms} <= set(sys.modules), "the package loads all of its files"
    rows = {mapper.class_.__name__ for mapper in models.Job.registry.mappers}
    assert rows <= set(models.__all__)
    # The nouns of the key in its owner's hand, and of pydantic.
    assert {name for name in rows if name.endswith("Row")} == {"ApiKeyRow", "BaseModelRow"}
