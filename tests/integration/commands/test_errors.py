"""An error of a command is one line, with its own exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.factories.bases import BASE_MODEL
from tests.integration.commands.invocations import Espalier, documents_of


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
