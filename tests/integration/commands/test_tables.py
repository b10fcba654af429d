"""Every command prints JSON on request, and tables within 100 columns."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from typer.testing import CliRunner

from cli.main import app
from core.db.session import service_transaction
from core.services import attempts
from tests.factories.bases import BASE_MODEL, POOL
from tests.factories.jobs import claim, queue_job
from tests.factories.tenants import Tenant, add_tenant
from tests.integration.commands.invocations import (
    MAX_COLUMNS,
    Espalier,
    documents_of,
    invocations,
    names_of_commands,
    read_terminal,
)


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
    lines = read_terminal([name], env, num_columns)
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


def test_a_check_in_a_pipe_is_as_wide_as_the_other_tables(espalier: Espalier) -> None:
    longest = max(map(len, espalier("check-contract").stdout.splitlines()))
    assert 80 < longest <= MAX_COLUMNS


def test_the_version_is_the_packages_and_its_commit_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_COMMIT", "0123456789abcdef")
    told = CliRunner().invoke(app, ["--version"])
    assert told.stdout == f"espalier {version('espalier')}+0123456789ab\n"
    monkeypatch.delenv("ESPALIER_COMMIT")
    told = CliRunner().invoke(app, ["--version"])
    assert told.stdout.startswith(f"espalier {version('espalier')}")
