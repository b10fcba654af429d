"""`python -m tests.black_hole DIRECTORY`: the database vanishes without a word, and every process notices in seconds.

The kernel drops the packets of its port, which needs a network namespace: `find_namespace` returns the command for one.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from core.db.migrate import login_url
from core.db.session import connect
from core.domain.bases import Registry
from local.ports import free_ports
from local.servers import LocalServers, ServerAddresses
from local.stack import prepare_database
from tests.databases import LOGINS, Database
from tests.faults import port_of
from tests.processes import leader_pid, running_api, schedule_process
from tests.waiting import PATIENCE_SECONDS, wait_until


def find_namespace() -> Sequence[str]:
    """Return the command that runs another in a network whose packets it may drop, or nothing where there is none."""
    for command in (["unshare", "--net"], ["unshare", "--net", "--user", "--map-root-user"]):
        tried = [*command, "iptables", "--wait", "--list-rules"]
        if (
            all(map(shutil.which, ("unshare", "iptables", "ip")))
            and not subprocess.run(tried, check=False, capture_output=True).returncode
        ):
            return command
    return ()


@contextmanager
def dropped(port: int) -> Iterator[None]:
    """Drop every packet from and to a port: neither end hears that the other is gone."""
    rules = [["INPUT", "--protocol", "tcp", f"--{side}port", str(port), "--jump", "DROP"] for side in ("d", "s")]
    for rule in rules:
        subprocess.run(["iptables", "--wait", "--append", *rule], check=True)
    yield
    for rule in rules:
        subprocess.run(["iptables", "--wait", "--delete", *rule], check=True)


def check(directory: Path) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with LocalServers(directory / "data", is_durable=False) as servers:
        owner_url = servers.addresses.postgres_url
        prepare_database(owner_url, Registry(base_models=()), logins=LOGINS)
        check_processes(
            Database(owner_url, owner_url, *(login_url(owner_url, each) for each in LOGINS)),
            servers.addresses,
            directory,
        )


def check_processes(database: Database, addresses: ServerAddresses, directory: Path) -> None:
    owner = connect(database.owner_url)
    port, log = free_ports(1)[0], directory / "log"
    with ExitStack() as exits:
        stream = exits.enter_context(log.open("wb"))
        schedule = exits.enter_context(schedule_process(database, addresses, log=stream))
        leaving = exits.enter_context(schedule_process(database, addresses))
        exits.enter_context(running_api(database.api_url, addresses.storage, port=port))
        wait_until(lambda: leader_pid(owner) in {schedule.pid, leaving.pid}, what="a leader")
        with dropped(port_of(database.owner_url)):
            wait_until(lambda: "database.unavailable" in log.read_text(), what="the schedule's warning")
            answer = ask(port, "/readyz")
            assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
            assert answer.json()["error"]["code"] == "database_unavailable"
            assert ask(port, "/livez").is_success
            leaving.send_signal(signal.SIGTERM)
            assert leaving.wait(PATIENCE_SECONDS) == 0
        wait_until(lambda: leader_pid(owner) == schedule.pid, what="the schedule's lead")
        wait_until(lambda: ask(port, "/readyz").is_success, what="readiness")
        assert schedule.poll() is None


def ask(port: int, path: str) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=PATIENCE_SECONDS)


if __name__ == "__main__":
    check(Path(sys.argv[1]))
