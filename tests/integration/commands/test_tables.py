"""Every command of `espalier`: JSON where it is asked for, tables within 100 columns, one line for an error."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from click.testing import Result
from sqlalchemy import Engine, text
from typer.testing import CliRunner

from cli.main import app, walk_commands
from core.db.session import operator_transaction, service_transaction
from core.domain.workers import WorkerFacts
from core.services import attempts
from core.services.operators import issue_operator_key
from core.services.workers import record_worker
from local.servers import ServerAddresses
from tests.integration.conftest import BASE_MODEL, Database, Tenant, add_tenant
from tests.integration.test_attempts import POOL, claim, queue_job
from tests.integration.test_demand import worker

ROOT = Path(__file__).resolve().parents[3]
MAX_COLUMNS = 100
LONG = "SomeOrganisation/A-Model-With-A-Rather-Long-Name-70B-Instruct-2026@none"
REGISTRY = {
    "base_models": [
        {
            "id": BASE_MODEL,
            "source": {"kind": "path", "location": "/nowhere"},
            "quantizations": ["nf4"],
            "target_modules": ["q_proj", "v_proj"],
            "max_seq_len": 256,
        }
    ]
}
ROW = '{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}'
Espalier = Callable[..., Result]

__all__ = ["worker"]  # a fixture


@pytest.fixture
def env(database: Database, servers: ServerAddresses) -> dict[str, str]:
    return {
        "ESPALIER_OWNER_DATABASE_URL": database.owner_url,
        "ESPALIER_DATABASE_URL": database.api_url,
        "ESPALIER_REDIS_URL": servers.redis_url,
        "ESPALIER_S3_ENDPOINT": servers.storage.endpoint,
        "ESPALIER_S3_ACCESS_KEY": servers.storage.access_key,
        "ESPALIER_S3_SECRET_KEY": servers.storage.secret_key,
        "ESPALIER_S3_BUCKET": servers.storage.bucket,
    }


@pytest.fixture
def espalier(env: dict[str, str]) -> Espalier:
    def run(*words: str | Path) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words], env=env, catch_exceptions=False)

    return run


@pytest.fixture
def busy(worker: Engine, owner: Engine) -> Tenant:
    """A tenant with a long slug, jobs that wait and run, a worker that serves and one that is gone."""
    tenant = add_tenant(owner)
    slug = tenant.slug + "-" + "x" * (31 - len(tenant.slug))
    with service_transaction(owner) as session:
        session.execute(text("update tenants set slug = :slug where id = :id"), {"slug": slug, "id": tenant.id})
        session.execute(text("truncate workers"))
    for _ in range(3):
        queue_job(owner, tenant)
    assert claim(worker) is not None
    with service_transaction(worker) as session:
        serving = WorkerFacts(
            "gpu-node-17.cluster.internal-0",
            (LONG, POOL),
            "serving",
            LONG,
            8,
            3,
            next_pool=POOL,
            version="0.1.0+0123456789ab",
        )
        record_worker(session, serving, alive_seconds=60, is_start=True)
        record_worker(session, WorkerFacts("gone", (POOL,), "idle"), alive_seconds=-1, is_start=True)
    return Tenant(tenant.id, slug, tenant.api_key, tenant.key_id)


def test_use_as_csv_is_whole_or_says_where_it_was_cut(
    espalier: Espalier, worker: Engine, owner: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.commands.usage._PAGE_ROWS", 2)
    queue_job(owner, add_tenant(owner), priority=100)
    days = [f"2026-03-0{day}" for day in range(1, 6)]
    book = text("""
        insert into usage (id, tenant_id, attempt_id, gpu_seconds, trained_tokens, created_at)
        select uuidv7(), tenant_id, id, 1, 1, cast(:day as timestamptz) from attempts where lease_token = :token
    """)
    for day in days:
        lease = claim(worker)
        assert lease is not None
        with service_transaction(worker) as session:
            attempts.requeue_attempt(session, lease)
            session.execute(book, {"day": f"{day}T12:00Z", "token": lease.token})
    period = ("--from", days[0], "--to", days[-1], "--group-by", "day", "--csv")
    whole, cut = espalier("usage", *period), espalier("usage", *period, "--limit", "2")
    assert [line.split(",")[0] for line in whole.stdout.splitlines()] == ["day", *days]
    assert whole.stderr == ""
    assert [line.split(",")[0] for line in cut.stdout.splitlines()] == ["day", *days[:2]]
    assert cut.stderr == f"There are more: --after {days[1]}\n"
    assert espalier("usage", *period, "--after", days[3]).stdout.splitlines()[1].startswith(days[4])


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


def test_every_command_prints_json_and_nothing_else_where_it_is_asked_to(
    espalier: Espalier, owner: Engine, busy: Tenant, tmp_path: Path
) -> None:
    called = invocations(tmp_path, owner, busy)
    assert set(called) == names_of_commands(), "call the new command here"
    judging = {"check-contract", "doctor"}  # of this database, whose files have no objects
    impossible = {"status", "demo", "base-models add", "base-models check", "base-models remove", "s3-check"}
    for name, words in called.items():
        if name == "up":
            continue  # its file is refused by typer itself; it is started for real in tests/integration/stack
        done = espalier(*name.split(), *words, "--json")
        told = documents_of(done.stdout)
        assert done.exit_code in ({1, 2} if name in impossible else {0, 1} if name in judging else {0}), (
            name,
            done.output,
        )
        assert told or name in ("audit", "set-asides", "usage"), name
        assert ("error" in told[0] if told else False) == (name in impossible), (name, told)


def test_tables_fit_a_hundred_columns_and_cut_nothing(
    espalier: Espalier, owner: Engine, busy: Tenant, tmp_path: Path
) -> None:
    tables = [
        name
        for name in names_of_commands()
        if name.endswith("list") or name in ("jobs", "workers", "pools", "usage", "top")
    ]
    tables += ["audit", "set-asides"]
    for name in sorted(tables):
        done = espalier(*name.split(), *invocations(tmp_path, owner, busy)[name])
        assert done.exit_code == 0, done.output
        assert max(map(len, done.stdout.splitlines()), default=0) <= MAX_COLUMNS, f"{name}\n{done.stdout}"
        assert "…" not in done.stdout
    shown = espalier("jobs").stdout
    ids = [job["id"] for job in documents_of(espalier("jobs", "--json").stdout)]
    assert len(ids) == 3
    assert all(job_id in shown for job_id in ids)


def test_the_list_of_operators_says_which_keys_may_only_read(espalier: Espalier) -> None:
    made = {}
    for words in (("keda", "--read-only"), ("olga",)):
        (told,) = documents_of(espalier("operators", "create", *words, "--json").stdout)
        made[told["api_key"].split("_")[2]] = told["is_read_only"]
    assert list(made.values()) == [True, False]
    listed = documents_of(espalier("operators", "list", "--json").stdout)
    assert {each["key_id"]: each["is_read_only"] for each in listed if each["key_id"] in made} == made
    lines = espalier("operators", "list").stdout.splitlines()
    assert "is read only" in lines[0]
    for key_id, is_read_only in made.items():
        (line,) = (each for each in lines if key_id in each)
        assert line.split()[2] == ("yes" if is_read_only else "no")


def test_what_is_shown_can_be_filtered_and_read_on(espalier: Espalier, busy: Tenant) -> None:
    (running,) = documents_of(espalier("jobs", "--status", "running", "--json").stdout)
    assert (running["tenant"], running["worker"]) == (busy.slug, "w")
    assert documents_of(espalier("jobs", "--tenant", busy.slug, "--pool", f"{BASE_MODEL}@nf4", "--json").stdout) == []
    first = espalier("jobs", "--limit", "1")
    after = re.search(r"There are more: --after (\S+)", first.stdout)
    assert after is not None
    assert after[1] in first.stdout
    assert after[1] not in espalier("jobs", "--after", after[1]).stdout
    pools = {pool["id"]: pool for pool in documents_of(espalier("pools", "--json").stdout)}
    assert (pools[POOL]["num_queued"], pools[POOL]["num_running"], pools[POOL]["workers_wanted"]) == (2, 1, 1)
    told = espalier("workers").stdout
    assert "3/8" in told
    assert "gone" in told


@pytest.mark.parametrize("num_columns", [80, 100])
@pytest.mark.parametrize("name", ["jobs", "pools", "workers"])
def test_a_terminal_shows_headings_ids_and_pools_whole(
    env: dict[str, str], busy: Tenant, name: str, num_columns: int
) -> None:
    lines = _read_terminal([name], env, num_columns)
    assert max(map(len, lines)) <= num_columns, lines
    headings = {
        "jobs": ["id", "tenant", "pool", "status", "steps", "age", "worker"],
        "pools": ["pool", "base", "queued", "oldest", "running", "slots", "wanted", "workers"],
        "workers": ["name", "state", "base", "slots", "beat", "up", "version", "serves"],
    }[name]
    assert set(lines[0].split()) <= set(headings)
    assert name != "pools" or num_columns < MAX_COLUMNS or lines[0].split() == headings
    assert not any(BASE_MODEL in line for line in lines)
    if name == "jobs":
        assert sum(re.search(r"ftjob-[0-9a-f]{32} .*(queued|running)", line) is not None for line in lines) == 3
        assert busy.slug[:3] in "".join(lines)


def test_a_pool_may_be_asked_for_as_tables_show_it(espalier: Espalier, owner: Engine, busy: Tenant) -> None:
    short = POOL.rpartition("/")[2]
    assert len(documents_of(espalier("jobs", "--pool", short, "--json").stdout)) == 3
    with service_transaction(owner) as session:
        copy = text("insert into queues (tenant_id, pool, num_queued, rank) values (:tenant, :pool, 0, 0)")
        session.execute(copy, {"tenant": busy.id, "pool": f"someone-else/{short}"})
    done = espalier("jobs", "--pool", short)
    assert (done.exit_code, done.stderr.startswith(f"There is no pool {short!r}.")) == (1, True)
    assert BASE_MODEL.partition("/")[0] in espalier("jobs").stdout


def _read_terminal(
    words: list[str], env: dict[str, str], num_columns: int, *, typed: str = "", exit_code: int = 0
) -> list[str]:
    """Return the lines that a command shows on a terminal of so many columns, where something is typed."""
    terminal, theirs = pty.openpty()
    here = {**os.environ, **env, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": str(num_columns)}
    argv = [sys.executable, "-m", "cli", *words]
    with subprocess.Popen(argv, cwd=ROOT, env=here, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.write(terminal, typed.encode())
        seen = _drain(terminal)
        assert process.wait() == exit_code, seen
    os.close(terminal)
    return re.sub(r"\x1b\[[0-9;]*m", "", seen.decode()).splitlines()


@pytest.mark.usefixtures("busy")
def test_top_in_a_pipe_is_one_frame(espalier: Espalier) -> None:
    done = espalier("top")
    assert done.stdout.count("2 queued, 1 running, 1 workers alive, 3 of 8 slots in use") == 1
    (frame,) = documents_of(espalier("top", "--json").stdout)
    assert [job["status"] for job in frame["jobs"]] == ["running"]


@pytest.mark.usefixtures("busy")
def test_top_on_a_terminal_goes_on_until_it_is_interrupted(env: dict[str, str]) -> None:
    terminal, theirs = pty.openpty()
    # A test run that was started in the background ignores SIGINT, and so would its children.
    argv = ["env", "--default-signal=INT", sys.executable, "-m", "cli", "top", "--interval", "0.1"]
    here = {**os.environ, **env, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen(argv, cwd=ROOT, env=here, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        seen = b""
        while len(set(re.findall(rb"\d\d:\d\d:\d\d UTC", seen))) < 2:
            seen += os.read(terminal, 65536)
        process.send_signal(signal.SIGINT)
        _drain(terminal)
        assert process.wait() == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    os.close(terminal)


def _drain(terminal: int) -> bytes:
    seen = b""
    try:
        while read := os.read(terminal, 65536):
            seen += read
    except OSError:  # the other side is closed
        pass
    return seen


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("jobs", "--tenant", "nobody-here"), "There is no tenant 'nobody-here'."),
        (
            ("jobs", "--after", "ftjob-1"),
            f"--after takes the id of a job, such as ftjob-{'0' * 32}: 'ftjob-1' is none.",
        ),
        (("jobs", "--pool", "nothing"), "There is no pool 'nothing'. `espalier pools` shows them all."),
        (("usage", "--from", "2026-03-02", "--to", "2026-03-01"), "The period ends on 2026-03-01, before it begins."),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(espalier: Espalier, words: tuple[str, ...], told: str) -> None:
    done = espalier(*words)
    assert (done.exit_code, done.stderr.strip(), done.stdout) == (1, told, "")
    done = espalier(*words, "--json")
    assert (done.exit_code, documents_of(done.stdout), done.stderr) == (1, [{"error": {"message": told}}], "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("jobs", "--status", "wrong"), "Invalid value for '--status': 'wrong' is not one of 'validating_files', "),
        (("jobs", "--limit", "0"), "Invalid value for '--limit': "),
        (("jobs", "--colour"), "No such option: --colour"),
        (("tenants", "set"), "Missing argument 'slug'. See `"),
        (("tenants", "nonsense"), "No such command 'nonsense'."),
        (("nonsense",), "No such command 'nonsense'."),
        (("--colour",), "No such option: --colour"),
        (("migrate", "--registry", "/nowhere"), "Invalid value for '--registry' ("),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(espalier: Espalier, words: tuple[str, ...], told: str) -> None:
    done = espalier(*words)
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.output
    assert done.stderr.startswith(told)
    assert done.stderr.endswith("--help`.\n")
    asked = espalier(*words, "--json")
    (document,) = documents_of(asked.stdout)
    assert (asked.exit_code, asked.stderr, document["error"]["message"].startswith(told)) == (2, "", True)


@pytest.mark.parametrize("words", [(), ("tenants",)])
def test_a_group_without_a_command_shows_its_help(espalier: Espalier, words: tuple[str, ...]) -> None:
    done = espalier(*words)
    assert "Usage: " in done.output
    assert len(done.output.splitlines()) > 5


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
    told = _read_terminal(words, env, 200, typed="another\n", exit_code=1)
    assert "Nothing was deleted." in told[-1]
    assert tenant.slug in espalier("tenants", "list", "--json").stdout
    told = _read_terminal(words, env, 200, typed=f"{tenant.slug}\n")
    assert f"This deletes all jobs, models, files, uploads and keys of the tenant {tenant.slug}." in "".join(told)
    new_slug = f"deleted-{tenant.id.hex[-8:]}"
    assert f"Tenant {tenant.slug} is now {new_slug}." in "".join(told)
    listed = documents_of(espalier("tenants", "list", "--json").stdout)
    assert {row["slug"]: row["deletion"] for row in listed}[new_slug] == "being deleted"
    assert espalier("tenants", "enable", new_slug).stderr == "This organization is deleted, for ever.\n"
    assert espalier(*words, "--yes").stderr == f"There is no tenant {tenant.slug!r}.\n"


def test_a_check_in_a_pipe_is_as_wide_as_the_other_tables(espalier: Espalier) -> None:
    longest = max(map(len, espalier("check-contract").stdout.splitlines()))
    assert 80 < longest <= MAX_COLUMNS


@pytest.mark.parametrize("name", ["jobs", "check-contract"])
def test_where_no_servers_run_the_option_that_names_others_is_told(name: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [name, "--data-dir", str(tmp_path)], env={"ESPALIER_OWNER_DATABASE_URL": None})
    assert f"no servers run on {tmp_path} (--data-dir)." in done.stderr


@pytest.mark.parametrize("name", ["jobs", "check-contract", "tenants list", "top", "audit"])
def test_a_database_that_is_away_is_one_line(name: str, env: dict[str, str]) -> None:
    away = {**env, "ESPALIER_OWNER_DATABASE_URL": "postgresql://nobody:hush@127.0.0.1:9/none"}
    done = CliRunner().invoke(app, name.split(), env=away, catch_exceptions=False)
    assert done.exit_code in (1, 2)
    assert len(done.stderr.splitlines()) == 1
    assert "hush" not in done.output


@pytest.mark.parametrize(
    ("words", "setting", "exit_code"),
    [
        (("base-models", "check", BASE_MODEL), "ESPALIER_TRAINER_THREADS_FILE", 1),
        (("check-contract",), "ESPALIER_QUANTUM_SECONDS_FILE", 2),
        (("check-contract",), "ESPALIER_S3_BUCKET_FILE", 2),
        (("top", "--json"), "ESPALIER_OWNER_DATABASE_URL_FILE", 2),
    ],
)
def test_a_file_of_a_setting_that_cannot_be_read_is_one_line(
    env: dict[str, str], words: tuple[str, ...], setting: str, exit_code: int
) -> None:
    changed = {**env, setting.removesuffix("_FILE"): "", setting: "/none"}
    done = CliRunner().invoke(app, words, env=changed, catch_exceptions=False)
    assert done.exit_code == exit_code
    (told,) = done.output.splitlines()
    assert f"{setting} names /none, which cannot be read" in told


def test_the_version_is_the_packages_and_its_commit_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_COMMIT", "0123456789abcdef")
    told = CliRunner().invoke(app, ["--version"])
    assert told.stdout == f"espalier {version('espalier')}+0123456789ab\n"
    monkeypatch.delenv("ESPALIER_COMMIT")
    told = CliRunner().invoke(app, ["--version"])
    assert told.stdout.startswith(f"espalier {version('espalier')}")


@pytest.fixture(autouse=True)
def _no_marks_of_rich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NO_COLOR", "1")
    yield
