"""`espalier up`, `down` and `status`: the local stack of one data directory."""

from __future__ import annotations

import itertools
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

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
console = Console(soft_wrap=True)


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
            console.print(_welcome(stack))
            _watch(stack)
    except KeyboardInterrupt:
        console.print("Stopped before it was up.")
    except STACK_FAILURES as error:
        console.print(f"[red]{escape(str(error))}[/]")
        raise typer.Exit(1) from error


def down(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Stop the stack that runs on a data directory, and wait until it is gone."""
    pid = find_launcher(data_dir)
    if pid is None:
        console.print(f"No stack runs on {data_dir}.")
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while is_running(pid):
        if time.monotonic() > deadline:
            console.print(f"[red]Process {pid} has not stopped in {_STOP_SECONDS:.0f} s. See {data_dir}/logs.[/]")
            raise typer.Exit(1)
        time.sleep(0.05)
    console.print("Stopped.")


def status(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show what runs on a data directory; exit code 1 unless all of it does."""
    pid = find_launcher(data_dir)
    if pid is None:
        console.print(f"No stack runs on {data_dir}.")
        raise typer.Exit(1)
    try:
        state = StackState.read(data_dir)
    except FileNotFoundError:
        console.print(f"Process {pid} is starting a stack on {data_dir}.")
        raise typer.Exit(1) from None
    is_ready = answers(state.api_url)
    console.print(f"{state.api_url} {'is ready' if is_ready else 'does not answer'}; launcher {pid}")
    for name, process_id in state.pids.items():
        console.print(f"  {name:<10} {process_id:>8}  {'runs' if is_running(process_id) else 'has ended'}")
    if not is_ready or not all(map(is_running, state.pids.values())):
        raise typer.Exit(1)


def guard_secrets() -> None:
    """Let nobody else read this process or what it writes: it holds, or makes, every password of the stack."""
    hide_memory()
    os.umask(UMASK)


def _interrupt_on_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Begin to stop. Only a second Ctrl-C, not a second `down`, may cut that short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _watch(stack: LocalStack) -> None:
    told: dict[str, str] = {}
    try:
        for look in itertools.count():
            time.sleep(_WATCH_SECONDS)
            for name in stack.restart_dead():
                log = stack.data_dir / "logs" / f"{name}.log"
                _tell(f"[yellow]{name} had died and was started again; see {log}[/]")
            if look % _WATCHES_PER_LOOK_AT_BASES == 0:
                told = _tell_of_bases(stack, told)
    except KeyboardInterrupt:
        console.print("Stopping.")


def _tell_of_bases(stack: LocalStack, told: dict[str, str]) -> dict[str, str]:
    """Print which bases cannot be used, and which can again, as far as that was not told. Returns what is told now."""
    try:
        unusable = stack.find_unusable_bases()
    except DATABASE_ERRORS:
        return told
    for base_model_id, reason in unusable.items():
        if told.get(base_model_id) != reason:
            _tell(f"[red]{escape(base_model_id)} is unusable, because {escape(reason)}[/]")
    for base_model_id in told.keys() - unusable.keys():
        _tell(f"{escape(base_model_id)} may be used again.")
    return unusable


def _tell(text: str) -> None:
    """Print what happens while the stack runs, which goes on although nobody can be told."""
    with suppress(OSError):  # the disk of a file that it is printed to may be full
        console.print(text)


def _welcome(stack: LocalStack) -> Panel:
    api_key = _local_key(stack)
    return Panel(
        f"[bold]Espalier is up.[/]\n\n  base_url  {stack.api_url}/v1\n  api_key   {api_key}\n\n"
        f"Logs are in {stack.data_dir}/logs. Ctrl-C, or espalier down, stops everything; the data stay.",
        expand=False,
    )


def _local_key(stack: LocalStack) -> str:
    """Return the API key of the tenant `local`: the same at every start on a data directory."""
    kept = stack.data_dir / "api_key"
    if not kept.exists():
        write_private(kept, stack.create_tenant("local"))
    return kept.read_text(encoding="utf-8")
