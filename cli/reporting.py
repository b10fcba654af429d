"""What every command has: the option `--json`, and errors in one line instead of a traceback.

Wrong options are such errors, too. They end the command before its work begins, with exit code 2.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import redis
import typer
import yaml
from alembic.util import CommandError
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from typer._click.exceptions import NoArgsIsHelpError  # typer has no public name for it
from typer.core import TyperGroup
from typer.exceptions import TyperException

from cli.output import fail, output_mode
from core.db.session import DATABASE_ERRORS, state_of
from core.domain.errors import DomainError
from core.settings import SETTINGS_ERRORS
from core.storage import StorageError

_KNOWN_ERRORS = (
    DomainError,
    OSError,
    SQLAlchemyError,
    *DATABASE_ERRORS,
    StorageError,
    *SETTINGS_ERRORS,
    CommandError,
    redis.RedisError,
    yaml.YAMLError,
)
_MIGRATE = "Run `espalier migrate` with this version: the schema is missing or older."
# By SQLSTATE, for errors whose message from the database does not say what to do.
_REMEDIES = {
    "42501": "Name the owner that `espalier migrate` ran as, and run it with this version. docs/operations.md says what"
    " the owner needs.",
    "42P01": _MIGRATE,  # no such table, column, function, schema, role
    "42703": _MIGRATE,
    "42883": _MIGRATE,
    "3F000": _MIGRATE,
    "42704": _MIGRATE,
    "22023": _MIGRATE,
    "25006": "It only reads, as a standby does: name the primary.",
}
_IS_JSON = "cli.is_json"
_JSON = typer.Option("--json", help="Print JSON: one document, or one object a line.")


def reporting(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that also takes `--json`, and ends with one line and exit code 1 on a known error."""

    @functools.wraps(command)
    def run(*, as_json: bool, **arguments: Any) -> None:
        with output_mode(is_json=as_json):
            try:
                command(**arguments)
            except _KNOWN_ERRORS as error:
                fail(describe_error(error))

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter(
        "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, _JSON]
    )
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    return run


class OneLineGroup(TyperGroup):
    """The group of all commands. It sees every wrong option, also of the groups inside it."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        is_json = "--json" in args
        with _refusing(is_json=is_json):
            context = super().make_context(info_name, args, parent, **extra)
        context.meta[_IS_JSON] = is_json
        return context

    def invoke(self, ctx: Any) -> Any:
        with _refusing(is_json=ctx.meta[_IS_JSON]):
            return super().invoke(ctx)


@contextmanager
def _refusing(*, is_json: bool) -> Iterator[None]:
    """Turn typer's error about options into one line. The help that a group prints without a command stays as it is."""
    try:
        yield
    except NoArgsIsHelpError:
        raise
    except TyperException as error:
        context = getattr(error, "ctx", None)
        hint = f" See `{context.command_path} --help`." if context else ""
        with output_mode(is_json=is_json):
            message = without_pydantic(error.format_message()).rstrip(".")
            fail(f"{message}.{hint}", exit_code=error.exit_code)


def without_pydantic(message: str) -> str:
    """Return a message without the words that pydantic puts before those of our own and typer's checks."""
    return message.replace("Value error, ", "")


def describe_error(error: BaseException) -> str:
    """Return an error in one sentence for an operator. It names what was asked, and quotes no secret."""
    if isinstance(error, DomainError):
        return error.message
    if isinstance(error, (DBAPIError, *DATABASE_ERRORS)):
        return _describe_refusal(error)
    if isinstance(error, CommandError):  # "Can't locate revision identified by ..."
        return f"The schema is not for this version: {_first_line(error)}. Run the newer version that migrated it."
    if isinstance(error, redis.RedisError):
        return f"Redis does not answer, or refuses: {_first_line(error)}"
    if isinstance(error, ValidationError):
        return _describe_settings(error)
    return _first_line(error)


def _describe_refusal(error: BaseException) -> str:
    """Return the database's message, and what to do about it."""
    remedy = _REMEDIES.get(state_of(error), "")
    return f"The database does not answer, or refuses: {_first_line(error)}{remedy and f'. {remedy}'}"


def _describe_settings(error: ValidationError) -> str:
    """Return what is missing or wrong. For settings this has the names of variables, and no value."""
    is_settings = error.title.endswith("Settings")
    faults = []
    for each in error.errors(include_input=False, include_url=False):
        place = ".".join(map(str, each["loc"]))
        faults.append(f"{'ESPALIER_' + place.upper() if is_settings else place}: {without_pydantic(each['msg'])}")
    return f"{'Settings' if is_settings else error.title}: {'; '.join(faults)}"


def _first_line(error: BaseException) -> str:
    lines = re.sub(r"^\(psycopg[.\w]*\) ", "", str(error).strip()).splitlines()
    return lines[0] if lines else type(error).__name__
