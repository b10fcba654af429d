"""`espalier`: run the local stack, and what an operator does by hand."""

from __future__ import annotations

import typer

from cli.commands.audit import audit
from cli.commands.base_models import base_models
from cli.commands.bucket import bucket
from cli.commands.contract import check_contract
from cli.commands.database import migrate
from cli.commands.datasets import validate
from cli.commands.demo import demo
from cli.commands.keys import keys
from cli.commands.operators import operators
from cli.commands.s3_check import s3_check
from cli.commands.set_asides import set_asides
from cli.commands.stack import down, status, up
from cli.commands.tenants import tenants

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
for command in (up, down, status, demo, migrate, audit, check_contract, s3_check, set_asides, validate):
    app.command()(command)
app.add_typer(tenants, name="tenants")
app.add_typer(keys, name="keys")
app.add_typer(base_models, name="base-models")
app.add_typer(operators, name="operators")
app.add_typer(bucket, name="bucket")
