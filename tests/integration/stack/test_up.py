"""`espalier up` and what stands beside it: real servers, real processes, commands as an operator types them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from cli.commands.stack import find_program
from cli.main import app
from local.external import ExternalServers, ExternalServersError
from local.locks import find_launcher, is_running
from local.ports import free_ports
from local.processes import ProcessSpec
from local.servers import LocalServers, ServerAddresses
from local.stack import LocalStack, PortTakenError, StackState
from tests.waiting import PATIENCE_SECONDS, wait_until

ROOT = Path(__file__).resolve().parents[3]
ESPALIER = (sys.executable, "-c", "from cli.main import app; app()")
BASE_MODEL = "acme-labs/tiny-base"
SETTINGS = "ESPALIER_"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry whose base cannot be loaded: no job is submitted here."""
    source = {"kind": "path", "location": "/nowhere"}
    entry = {"id": BASE_MODEL, "source": source, "target_modules": ["q_proj"], "max_seq_len": 256}
    path = tmp_path_factory.mktemp("registry") / "registry.yaml"
    path.write_text(yaml.safe_dump({"base_models": [entry | {"quantizations": ["nf4"]}]}))
    return path


@dataclass(frozen=True)
class Up:
    """A running `espalier up`: its process, and where what it says is kept."""

    process: subprocess.Popen[bytes]
    data_dir: Path
    said_path: Path

    @property
    def said(self) -> str:
        return self.said_path.read_text()

    @property
    def state(self) -> StackState:
        return StackState.read(self.data_dir)

    @property
    def api_key(self) -> str:
        (found,) = re.findall(r"esp_\S+", self.said)
        return found

    def everything(self) -> list[int]:
        """The pids of the launcher and of all that runs below it."""
        return [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))]


@contextmanager
def run_up(
    data_dir: Path,
    registry: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> Iterator[Up]:
    argv = [*prefix, *ESPALIER, "up", "--data-dir", str(data_dir), "--registry", str(registry), "--port", "0", *options]
    said_path = data_dir.with_suffix(".said")
    with said_path.open("wb") as out, subprocess.Popen(argv, env=clean(env), stdout=out, stderr=out) as process:
        try:
            wait_until(lambda: "is up" in said_path.read_text() or process.poll() is not None, what="the stack")
            assert process.poll() is None, said_path.read_text()
            yield Up(process, data_dir.resolve(), said_path)
        finally:
            process.terminate()


def clean(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this environment without settings of ours, plus `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    return {**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **(extra or {})}


def espalier(*words: str | Path, env: Mapping[str, str] | None = None) -> Result:
    """Run a command that ends by itself, in this process: what `up` changes in a process, such as signals, it does not."""
    assert words[0] != "up"
    unset = dict.fromkeys(name for name in os.environ if name.startswith(SETTINGS))
    return CliRunner().invoke(app, [str(word) for word in words], env={**unset, **(env or {})}, catch_exceptions=False)


def fail_up(*words: str | Path, env: Mapping[str, str] | None = None) -> str:
    """Run an `up` that is to refuse, and return what it says."""
    argv = [*ESPALIER, "up", "--port", "0", *map(str, words)]
    done = subprocess.run(argv, env=clean(env), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1  # a traceback has more
    return done.stderr


def list_models(api_url: str, api_key: str) -> httpx.Response:
    return httpx.get(
        f"{api_url}/v1/models",
        headers={"Authorization": f"Bearer {api_key}"},
        trust_env=False,
        timeout=PATIENCE_SECONDS,
    )


@pytest.fixture(scope="module")
def up(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with run_up(tmp_path_factory.mktemp("stack") / "data", registry) as running:
        yield running


def test_up_says_once_that_a_base_cannot_be_used_and_why_before_any_job(up: Up) -> None:
    wait_until(lambda: "is unusable" in up.said)
    assert up.said.count(f"{BASE_MODEL} is unusable, because There is no base model at /nowhere.") == 1


def test_up_prints_a_url_and_a_key_that_a_client_can_use_at_once(up: Up) -> None:
    assert f"{up.state.api_url}/v1" in up.said
    answer = list_models(up.state.api_url, up.api_key)
    assert [model["id"] for model in answer.json()["data"]] == [BASE_MODEL]


def test_what_up_says_in_a_file_is_folded_and_not_cut(up: Up) -> None:
    panel = [line for line in up.said.splitlines() if line.startswith("│")]
    assert {len(line) for line in panel} <= set(range(101))
    assert all(line.endswith("│") for line in panel)
    told = " ".join(line.strip("│ ") for line in panel)
    assert "Ctrl-C, or espalier down, stops everything; the data stay." in told


def test_where_the_path_does_not_lead_to_the_command_line_it_is_said_how_to_call_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / ".venv" / "bin" / "espalier"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_program() == f"The command line is {program}."
    monkeypatch.chdir(tmp_path)
    assert find_program() == "The command line is .venv/bin/espalier, from this directory."
    monkeypatch.setenv("PATH", str(program.parent))
    assert find_program() is None


def test_status_names_every_process(up: Up) -> None:
    done = espalier("status", "--data-dir", up.data_dir)
    assert done.exit_code == 0, done.stdout
    assert f"launcher {up.process.pid}" in done.stdout
    for name in ("s3", "redis", "postgres", "api", "worker", "schedule"):
        assert re.search(rf"^ +{name} +{up.state.pids[name]} +runs$", done.stdout, re.MULTILINE)


def test_up_tells_a_program_what_it_tells_people(registry: Path, tmp_path: Path) -> None:
    argv = [*ESPALIER, "up", "--json", "--data-dir", str(tmp_path / "data"), "--registry", str(registry), "--port", "0"]
    with subprocess.Popen(argv, env=clean(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert (told["event"], told["logs"]) == ("up", str(tmp_path / "data" / "logs"))
        assert list_models(told["base_url"].removesuffix("/v1"), told["api_key"]).is_success
        refused = subprocess.run(argv, env=clean(), capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert "message" in json.loads(refused.stdout)["error"]
        process.terminate()
        assert [json.loads(line) for line in process.stdout] == [{"event": "stopping"}]
    assert process.returncode == 0


def test_nothing_runs_where_nothing_was_started(tmp_path: Path) -> None:
    for words in (("status",), ("tenants", "create", "acme")):
        done = espalier(*words, "--data-dir", tmp_path / "empty")
        assert done.exit_code == 1
        assert "run" in done.stderr
    assert espalier("down", "--data-dir", tmp_path / "empty").exit_code == 0
    assert not (tmp_path / "empty").exists()


def test_an_operator_makes_tenants_and_keys_and_revokes_keys(up: Up) -> None:
    where = ("--data-dir", up.data_dir)
    first, second = (
        espalier(*words, *where).stdout.strip() for words in (("tenants", "create", "acme"), ("keys", "create", "acme"))
    )
    assert first != second
    assert list_models(up.state.api_url, first).is_success
    assert list_models(up.state.api_url, second).is_success
    assert espalier("keys", "revoke", first.split("_")[2], *where).exit_code == 0
    wait_until(lambda: list_models(up.state.api_url, first).status_code == 401)
    assert list_models(up.state.api_url, second).is_success


def test_an_operator_sets_quotas_rotates_keys_switches_bases_and_reads_who_did_what(up: Up) -> None:
    where = ("--data-dir", up.data_dir)

    def run(*words: str) -> str:
        done = espalier(*words, *where)
        assert done.exit_code == 0, done.stdout
        return done.stdout

    base = BASE_MODEL
    run("tenants", "create", "hooli")
    run("tenants", "set", "hooli", "--weight", "2.5", "--max-tokens-per-job", "1000000", "--allow", base)
    assert all(word in run("tenants", "list", "--json") for word in ("hooli", "2.5", "1000000", base))
    run("tenants", "set", "hooli", "--max-tokens-per-job", "none", "--allow", "none")
    rotated = run("keys", "rotate", "hooli", "first").strip()
    assert list_models(up.state.api_url, rotated).is_success
    assert run("keys", "list", "hooli").count("first") == 2
    run("tenants", "disable", "hooli")
    wait_until(lambda: list_models(up.state.api_url, rotated).status_code == 403)
    run("tenants", "enable", "hooli")
    run("base-models", "disable", base)
    wait_until(lambda: not list_models(up.state.api_url, rotated).json().get("data", [0]))
    run("base-models", "enable", base)
    operator = run("operators", "create", "olga").strip()
    asked = {"headers": {"Authorization": f"Bearer {operator}"}, "trust_env": False}
    assert (
        httpx.get(f"{up.state.api_url}/admin/tenants/hooli", **asked, timeout=PATIENCE_SECONDS).json()[
            "max_tokens_per_job"
        ]
        is None
    )
    run("operators", "revoke", operator.split("_")[2])
    assert httpx.get(f"{up.state.api_url}/admin/tenants/hooli", **asked, timeout=PATIENCE_SECONDS).status_code == 401
    said = run("audit", "--tenant", "hooli")
    assert said.index("tenant.changed") < said.index("tenant.created")
    assert "cli:" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("tenants", "create", "local"), "There is a tenant 'local' already."),
        (("keys", "create", "nobody"), "There is no tenant 'nobody'."),
        (("tenants", "set", "local", "--weight", "0"), "weight: Input should be greater than or equal to 0.01."),
        (("base-models", "disable", "gpt-9"), "There is no base model 'gpt-9'."),
        (("keys", "revoke", "nothing"), "There is no API key 'nothing'."),
    ],
)
def test_an_operators_mistake_is_told_in_words(up: Up, words: tuple[str, ...], told: str) -> None:
    done = espalier(*words, "--data-dir", up.data_dir)
    assert done.exit_code == 1
    assert done.stderr.strip() == told


def test_a_worker_that_died_is_started_again_and_up_says_so(up: Up) -> None:
    before = up.state.pids
    os.kill(before["worker"], signal.SIGKILL)
    wait_until(lambda: up.state.pids["worker"] != before["worker"])
    assert is_running(up.state.pids["worker"])
    assert {**up.state.pids, "worker": 0} == {**before, "worker": 0}
    wait_until(lambda: "worker had died and was started again" in up.said)


def test_a_stack_whose_state_cannot_be_written_goes_on_and_writes_it_at_the_next_round(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local.supervisor._DELAYS_SECONDS", (0.0,))
    stack = LocalStack(tmp_path, registry_path=registry, servers=ExternalServers(tmp_path))
    died = stack._supervisor.start(ProcessSpec("weak", [sys.executable, "-c", ""]))
    try:
        wait_until(lambda: not died.is_alive)
        in_the_way = tmp_path / "stack.json.new"
        in_the_way.mkdir()
        assert stack.restart_dead() == ("weak",)
        assert not (tmp_path / "stack.json").exists()
        in_the_way.rmdir()
        stack.restart_dead()
        assert StackState.read(tmp_path).pids == stack._supervisor.pids
    finally:
        stack._supervisor.stop()


READER = """
import json, sys
read = []
for pid in sys.argv[1:]:
    for name in ("environ", "mem"):
        try:
            open(f"/proc/{pid}/{name}", "rb").close()
            read.append(pid)
        except PermissionError:
            pass
print(json.dumps(read))
"""


def test_no_process_that_holds_a_password_can_be_read_by_another_of_its_user(registry: Path, tmp_path: Path) -> None:
    # Root goes without its rights to read any process, so that nothing but the holders' own doing is in its way.
    prefix = ("setpriv", "--bounding-set=-sys_ptrace,-perfmon,-sys_admin") if os.geteuid() == 0 else ()
    env = {"ESPALIER_API_PROCESSES": "2"}
    with run_up(tmp_path / "data", registry, env=env, prefix=prefix) as running:
        pids = running.state.pids
        api = [pids["api"], *(child.pid for child in psutil.Process(pids["api"]).children() if is_serving(child))]
        assert len(api) == 3
        holders = [running.process.pid, *api, pids["worker"], pids["schedule"]]
        argv = [*prefix, sys.executable, "-c", READER, *map(str, holders)]

        def read() -> list[str]:
            found: list[str] = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
            return found

        wait_until(lambda: not read())  # the last of the API's children may still be starting


def is_serving(child: psutil.Process) -> bool:
    return "spawn_main" in " ".join(child.cmdline())


@pytest.mark.skipif(os.geteuid() != 0, reason="who holds a password hides its environment from all but root")
def test_who_serves_holds_its_own_password_only(up: Up) -> None:
    secrets = json.loads((up.data_dir / "secrets.json").read_text())
    for name in ("api", "worker", "schedule"):
        held = Path(f"/proc/{up.state.pids[name]}/environ").read_text()
        assert f"postgresql://espalier_{name}:{secrets[name]}@" in held
        others = {"postgres", "api", "worker", "schedule"} - {name}
        assert not [other for other in others if secrets[other] in held]


def test_a_second_up_is_refused_and_told_who_is_first(up: Up, registry: Path) -> None:
    assert f"is in use by process {up.process.pid}" in fail_up("--data-dir", up.data_dir, "--registry", registry)
    assert espalier("status", "--data-dir", up.data_dir).exit_code == 0


def test_what_down_stopped_comes_back_with_its_key_and_leaves_nothing_when_killed(
    registry: Path, tmp_path: Path
) -> None:
    with run_up(tmp_path / "data dir", registry) as first:
        everything = first.everything()
        assert len(everything) >= 7
        assert espalier("down", "--data-dir", first.data_dir).exit_code == 0
        assert not any(map(is_running, everything))
        assert first.process.wait() == 0
        api_key = first.api_key
    with run_up(tmp_path / "data dir", registry) as second:
        assert list_models(second.state.api_url, api_key).is_success
        assert second.api_key == api_key
        everything = second.everything()
        second.process.kill()
        wait_until(lambda: not any(map(is_running, everything)))
    assert find_launcher(tmp_path / "data dir") is None


def test_what_killed_processes_have_left_in_the_temporary_directory_goes_with_the_next_start(
    registry: Path, tmp_path: Path
) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    env = {"TMPDIR": str(place), "ESPALIER_API_PROCESSES": "2"}
    with run_up(tmp_path / "data", registry, env=env) as killed:
        everything = killed.everything()
        for pid in everything:
            with suppress(ProcessLookupError):  # the death of another may have been its own
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, everything)))
    assert list(place.glob("espalier-api-*")), "nothing was left that could go"
    with run_up(tmp_path / "data", registry, env=env) as following:
        assert espalier("down", "--data-dir", following.data_dir).exit_code == 0
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", ["redis", "s3", "postgres"])
def test_a_server_that_died_is_started_again_beside_the_rest_and_up_and_status_say_so(up: Up, name: str) -> None:
    before = up.state.pids
    os.kill(before[name], signal.SIGKILL)
    wait_until(lambda: up.state.pids[name] != before[name])
    assert {key for key in before if up.state.pids[key] != before[key]} == {name}
    wait_until(lambda: f"{name} had died and was started again" in up.said)
    wait_until(lambda: espalier("status", "--data-dir", up.data_dir).exit_code == 0)
    assert re.search(rf"^ +{name} +{up.state.pids[name]} +runs$", status_of(up), re.MULTILINE)
    wait_until(lambda: list_models(up.state.api_url, up.api_key).is_success)
    assert up.process.poll() is None


def status_of(up: Up) -> str:
    return espalier("status", "--data-dir", up.data_dir).stdout


def test_ctrl_c_while_it_starts_leaves_nothing(registry: Path, tmp_path: Path) -> None:
    argv = [*ESPALIER, "up", "--data-dir", str(tmp_path / "data"), "--registry", str(registry), "--port", "0"]
    with subprocess.Popen(argv, env=clean(), stdout=subprocess.PIPE, text=True) as process:
        wait_until(lambda: (tmp_path / "data" / "logs" / "s3.log").exists())
        everything = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate()
    assert "Stopped before it was up." in told
    assert process.returncode == 0
    # What it was just about to start is ended by the kernel, a moment after the launcher.
    wait_until(lambda: not any(map(is_running, everything)))
    assert find_launcher(tmp_path / "data") is None


def test_a_taken_port_is_refused_before_anything_starts(registry: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        stack = LocalStack(tmp_path / "data", api_port=port, registry_path=registry, is_durable=False)
        with pytest.raises(PortTakenError, match=f"Port {port} is taken"), stack:
            pass
    assert not (tmp_path / "data" / "secrets.json").exists()


def external_settings(addresses: ServerAddresses) -> dict[str, str]:
    return {
        "ESPALIER_OWNER_DATABASE_URL": addresses.postgres_url,
        "ESPALIER_REDIS_URL": addresses.redis_url,
        "ESPALIER_S3_ENDPOINT": addresses.storage.endpoint,
        "ESPALIER_S3_ACCESS_KEY": addresses.storage.access_key,
        "ESPALIER_S3_SECRET_KEY": addresses.storage.secret_key,
    }


def test_external_servers_are_used_and_left_running(registry: Path, tmp_path: Path) -> None:
    # Servers of its own: the runtime roles, which get new passwords here, are the whole server's.
    with LocalServers(tmp_path / "servers", is_durable=False) as servers:
        env = external_settings(servers.addresses)
        with run_up(tmp_path / "data", registry, "--external", env=env) as running:
            assert set(running.state.pids) == {"api", "worker", "schedule"}
            assert list_models(running.state.api_url, running.api_key).is_success
            made = espalier("tenants", "create", "acme", env=env).stdout.strip()
            assert list_models(running.state.api_url, made).is_success
            password = servers.secrets.postgres.encode()
            if os.geteuid() == 0:  # the processes hide their environment from everybody else
                for pid in running.state.pids.values():
                    assert password not in Path(f"/proc/{pid}/environ").read_bytes()
            everything = running.everything()
            assert espalier("down", "--data-dir", running.data_dir).exit_code == 0
            assert not any(map(is_running, everything))
        assert set(servers.pids) == {"s3", "redis", "postgres"}
        assert all(map(is_running, servers.pids.values()))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ESPALIER_OWNER_DATABASE_URL": ""}, "Set ESPALIER_OWNER_DATABASE_URL"),
        ({"ESPALIER_OWNER_DATABASE_URL": "postgresql://postgres:wrong@{postgres}"}, "ESPALIER_OWNER_DATABASE_URL"),
        ({"ESPALIER_REDIS_URL": "redis://:wrong@{redis}"}, "ESPALIER_REDIS_URL"),
        ({"ESPALIER_S3_SECRET_KEY": "wrong"}, "ESPALIER_S3_ENDPOINT and its keys"),
    ],
)
def test_a_wrong_setting_of_an_external_server_is_named(
    change: dict[str, str], told: str, servers: ServerAddresses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "postgres": servers.postgres_url.rpartition("@")[2],
        "redis": servers.redis_url.rpartition("@")[2],
    }
    for name, value in (external_settings(servers) | change).items():
        monkeypatch.setenv(name, value.format(**places))
    with pytest.raises(ExternalServersError, match=told):
        ExternalServers(tmp_path).start()
    assert find_launcher(tmp_path) is None


def test_settings_that_are_missing_are_named_and_the_others_are_not_shown(registry: Path, tmp_path: Path) -> None:
    env = {"ESPALIER_OWNER_DATABASE_URL": "postgresql://x", "ESPALIER_REDIS_URL": "redis://x"}
    env["ESPALIER_S3_SECRET_KEY"] = "hush-hush"
    told = fail_up("--external", "--data-dir", tmp_path, "--registry", registry, env=env)
    assert "ESPALIER_S3_ENDPOINT" in told
    assert "ESPALIER_S3_ACCESS_KEY" in told
    assert "hush-hush" not in told


def test_migrate_prepares_a_database_and_lets_only_the_named_roles_in(registry: Path, tmp_path: Path) -> None:
    with LocalServers(tmp_path, is_durable=False) as servers:
        url = servers.addresses.postgres_url
        env = {"ESPALIER_OWNER_DATABASE_URL": url, "ESPALIER_API_PASSWORD": "api-password"}
        for _ in range(2):
            assert espalier("migrate", "--registry", registry, env=env).exit_code == 0
        place = url.rpartition("@")[2]
        with psycopg.connect(f"postgresql://espalier_api:api-password@{place}") as connection:
            assert connection.execute("select id from base_models").fetchall() == []  # it is nobody's tenant
        with psycopg.connect(url) as connection:
            assert connection.execute("select id from base_models").fetchall() == [(BASE_MODEL,)]
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"postgresql://espalier_worker:api-password@{place}")
