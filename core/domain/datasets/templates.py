"""Chat templates: programs that come with a base model. They run in jinja2's sandbox only.

A template gets the environment that transformers and serving stacks give it (options, filters, globals), so that
training and serving render a conversation alike. The sandbox keeps a template from the interpreter. It does not stop an
endless loop or a full memory; only the limits of a process do (core.previews).
"""

from __future__ import annotations

import datetime as dt
import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def compile_template(source: str) -> jinja2.Template:
    """Return a chat template ready to render. Raises jinja2.TemplateError."""
    return _make_environment().from_string(source)


def find_texts(source: str) -> frozenset[str]:
    """Return the string constants in a template's expressions. The phrases that it looks for are among them."""
    constants = _make_environment().parse(source).find_all(jinja2.nodes.Const)
    return frozenset(each.value for each in constants if isinstance(each.value, str))


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _format_now
    environment.globals["dict"] = _PlainDict()
    environment.globals["namespace"] = _PlainNamespace
    return environment


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's words in some templates. Its body is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PlainDict:
    """`dict(...)` for templates, without the type's own attributes."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _PlainNamespace(jinja2.utils.Namespace):
    """`namespace(...)` for templates, which may not store private names on it."""

    def __init__(*args: Any, **fields: Any) -> None:
        attributes = dict(*args[1:], **fields)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"A namespace takes no private name such as {name!r}.")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _format_now(pattern: str) -> str:
    return dt.datetime.now().strftime(pattern)  # noqa: DTZ005 (the local time, as serving stacks give it)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 (as templates call it)
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
