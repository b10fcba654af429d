"""`espalier up`, `down` and `status`: the local stack of one data directory."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.markup import escape
from rich.panel import Panel

from cli.output import fail, is_json, print_json, say, show
from cli.owner import DEFAULT_DATA_DIR, DataDir
from core.db.session import DATABASE_ERRORS
from core.sandbox import hide_memory
from local.binaries import BinaryMissingError
from local.external import ExternalServers, ExternalServersError
from local.locks import AlreadyRunningError, find_launcher, is_running
from local.private_files import UMASK, write_private
from local.processes import ProcessFailedError
from local.servers import LocalServers
from local.stack import LocalStack, PortTakenError, StackState, answers

STACK_FAILURES = (
    AlreadyRunningError,
    BinaryMissingError,
    ExternalServersError,
    PortTakenError,
    ProcessFailedError,
    RuntimeError,
    ValueError,
)
_STOP_SECONDS = 180.0
_WATCH_SECONDS = 0.2
_WATCHES_PER_LOOK_AT_BASES = 25


def up(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    port: Annotated[int, typer.Option(help="The API's port; 0 for any free one.")] = 8000,
    registry: Annotated[
        Path | None, typer.Option(envvar="ESPALIER_REGISTRY", exists=True, dir_okay=False, help="Base models (YAML).")
    ] = None,
    *,
    external: Annotated[bool, typer.Option("--external", help="Use the servers that the settings name.")] = False,
) -> None:
    """Start the service, with servers of its own unless --external, and stay until Ctrl-C."""
    guard_secrets()
    _interrupt_on_signals()
    try:
        servers = ExternalServers(data_dir) if external else LocalServers(data_dir)
        with LocalStack(data_dir, api_port=port, registry_path=registry, servers=servers) as stack:
            _welcome(stack)
            _watch(stack)
    except KeyboardInterrupt:
        say("Stopped before it was up.", event="stopped")
    except STACK_FAILURES as error:
        fail(str(error))


def down(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Stop the stack that runs on a data directory, and wait until it is gone."""
    pid = find_launcher(data_dir)
    if pid is None:
        say(f"No stack runs on {data_dir}.", stopped=None)
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while is_running(pid):
        if time.monotonic() > deadline:
            fail(f"Process {pid} has not stopped in {_STOP_SECONDS:.0f} s. See {data_dir}/logs.")
        time.sleep(0.05)
    say("Stopped.", stopped=pid)


def status(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show what runs on a data directory; exit code 1 unless all of it does."""
    pid = find_launcher(data_dir)
    if pid is None:
        fail(f"No stack runs on {data_dir}.")
    try:
        state = StackState.read(data_dir)
    except FileNotFoundError:
        fail(f"Process {pid} is starting a stack on {data_dir}.")
    is_ready = answers(state.api_url)
    processes = [{"name": name, "pid": each, "is_running": is_running(each)} for name, each in state.pids.items()]
    if is_json():
        print_json({"api_url": state.api_url, "is_ready": is_ready, "launcher": pid, "processes": processes})
    else:
        say(f"{state.api_url} {'is ready' if is_ready else 'does not answer'}; launcher {pid}")
        for each in processes:
            say(f"  {each['name']:<10} {each['pid']:>8}  {'runs' if each['is_running'] else 'has ended'}")
    if not is_ready or not all(each["is_running"] for each in processes):
        raise typer.Exit(1)


def guard_secrets() -> None:
    """Keep other users from reading this process and its files: it holds, or makes, every password of the stack."""
    hide_memory()
    os.umask(UMASK)


def _interrupt_on_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Start to stop. Only a second Ctrl-C can cut that short; a second `down` cannot."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _watch(stack: LocalStack) -> None:
    told: dict[str, str] = {}
    try:
        for look in itertools.count():
            time.sleep(_WATCH_SECONDS)
            for name in stack.restart_dead():
                log = stack.data_dir / "logs" / f"{name}.log"
                said = f"{name} had died and was started again; see {log}"
                _tell(said, style="yellow", event="restarted", process=name, log=str(log))
            if look % _WATCHES_PER_LOOK_AT_BASES == 0:
                told = _tell_of_bases(stack, told)
    except KeyboardInterrupt:
        say("Stopping.", event="stopping")


def _tell_of_bases(stack: LocalStack, told: dict[str, str]) -> dict[str, str]:
    """Print which bases became unusable, or usable again, since the last call. Returns the bases reported now."""
    try:
        unusable = stack.find_unusable_bases()
    except DATABASE_ERRORS:
        return told
    for base_model_id, reason in unusable.items():
        if told.get(base_model_id) != reason:
            facts = {"event": "base_model.unusable", "base_model": base_model_id, "reason": reason}
            _tell(f"{base_model_id} is unusable, because {reason}", style="red", **facts)
    for base_model_id in told.keys() - unusable.keys():
        _tell(f"{base_model_id} may be used again.", event="base_model.usable", base_model=base_model_id)
    return unusable


def _tell(text: str, *, style: str = "", **facts: str) -> None:
    """Print an event of the running stack. The stack continues even if nothing can be printed."""
    with suppress(OSError):  # the output may be a file on a full disk
        say(text, style=style, **facts)


def _welcome(stack: LocalStack) -> None:
    api_key, base_url = _local_key(stack), f"{stack.api_url}/v1"
    if is_json():
        logs = str(stack.data_dir / "logs")
        print_json({"event": "up", "base_url": base_url, "api_key": api_key, "logs": logs})
        return
    panel = Panel(
        f"[bold]Espalier is up.[/]\n\n  base_url  {base_url}\n  api_key   {api_key}\n\n"
        f"Every call is described at {stack.api_url}/docs. Logs are in {escape(str(stack.data_dir))}/logs.\n"
        f"Ctrl-C, or espalier down --data-dir {escape(str(stack.data_dir))}, stops everything; the data stay.",
        expand=False,
    )
    show(panel)
    if called := find_program():
        say(called)


def find_program() -> str | None:
    """Return a sentence on how to call the command line, or None if its name alone is enough."""
    program = Path(sys.executable).parent / "espalier"
    if shutil.which("espalier") or not program.exists():
        return None
    if program.is_relative_to(Path.cwd()):
        return f"The command line is {program.relative_to(Path.cwd())}, from this directory."
    return f"The command line is {program}."


def _local_key(stack: LocalStack) -> str:
    """Return the API key of the tenant `local`. It is the same at every start on a data directory."""
    kept = stack.data_dir / "api_key"
    if not kept.exists():
        write_private(kept, stack.create_tenant("local"))
    return kept.read_text(encoding="utf-8")
