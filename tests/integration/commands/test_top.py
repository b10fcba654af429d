"""`espalier top` prints one frame into a pipe, and refreshes on a terminal."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys

import pytest

from tests.integration.commands.invocations import ROOT, Espalier, documents_of, drain


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
        drain(terminal)
        assert process.wait() == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    os.close(terminal)
