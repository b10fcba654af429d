"""`espalier`: run the local stack, and what an operator does by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from typer.models import CommandInfo

from cli.commands.audit import audit
from cli.commands.base_models import base_models
from cli.commands.bucket import bucket
from cli.commands.database import migrate
from cli.commands.datasets import validate
from cli.commands.demo import demo
from cli.commands.doctor import doctor
from cli.commands.jobs import jobs
from cli.commands.keys import keys
from cli.commands.operators import operators
from cli.commands.pools import pools
from cli.commands.promises import check_contract
from cli.commands.s3_check import s3_check
from cli.commands.set_asides import set_asides
from cli.commands.stack import down, status, up
from cli.commands.tenants import tenants
from cli.commands.top import top
from cli.commands.usage import usage
from cli.commands.workers import workers
from cli.reporting import OneLineGroup, reporting
from core.version import read_version

app = typer.Typer(cls=OneLineGroup, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
_COMMANDS: tuple[Callable[..., None], ...] = (
    *(up, down, status, demo, migrate, validate),
    *(jobs, workers, pools, usage, top),
    *(audit, check_contract, s3_check, set_asides, doctor),
)
for command in _COMMANDS:
    app.command()(command)
app.add_typer(tenants, name="tenants")
app.add_typer(keys, name="keys")
app.add_typer(base_models, name="base-models")
app.add_typer(operators, name="operators")
app.add_typer(bucket, name="bucket")


def _print_version(is_asked: bool) -> None:  # noqa: FBT001 (typer's form)
    if is_asked:
        print(f"espalier {read_version()}")
        raise typer.Exit


@app.callback()
def _main(
    *,
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Run the local stack, and do what an operator does by hand."""


def walk_commands(group: typer.Typer = app) -> Iterator[CommandInfo]:
    """Yield every command, those of groups too."""
    yield from group.registered_commands
    for each in group.registered_groups:
        assert each.typer_instance is not None
        yield from walk_commands(each.typer_instance)


for _registered in walk_commands():
    assert _registered.callback is not None
    _registered.name = _registered.name or _registered.callback.__name__.replace("_", "-")
    _registered.callback = reporting(_registered.callback)
