"""Fixtures of all tests. Servers are started only for tests that ask for them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from local.servers import ServerAddresses
from tests.servers import shared_servers

_SHOWN_CHARACTERS = 4000


@pytest.hookimpl(trylast=True)  # behind the one that makes the reporter
def pytest_configure(config: pytest.Config) -> None:
    if terminal := config.pluginmanager.get_plugin("terminalreporter"):  # the processes of xdist have none
        config.pluginmanager.register(_FailureTeller(terminal))


class _FailureTeller:
    """Prints a failure as soon as it happens: a run that is cut off later has said what failed."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.write_line(f"\n{report.nodeid} ({report.when}):\n{report.longreprtext[-_SHOWN_CHARACTERS:]}")


# How long an example takes, and the finding of one, is the machine's affair.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _own_umask() -> Iterator[None]:
    """Give the next test the umask that this one was given: `espalier up` closes its process's files, also in a test."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[ServerAddresses]:
    """Real PostgreSQL, Redis and S3, shared by all xdist workers of this run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base
    with shared_servers(shared / "shared-servers") as addresses:
        yield addresses
