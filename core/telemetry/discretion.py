"""Keeps tenants' words out of traces: a query holds what they look for. Imported only where there are traces."""

from __future__ import annotations

from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span, SpanProcessor

_QUERY = "url.query"


class QueryHider(SpanProcessor):
    """Replaces the query in the span of a request before anybody exports it."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002 (the library's name)
        if _QUERY in (span.attributes or {}):
            span.set_attribute(_QUERY, "hidden")
