"""Keeps tenants' words out of traces: a URL's query contains what they search for. Imported only if traces are on."""

from __future__ import annotations

from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span, SpanProcessor

_QUERY = "url.query"


class QueryHider(SpanProcessor):
    """Replaces the query in the span of a request before the span is exported."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002 (the library's name)
        if _QUERY in (span.attributes or {}):
            span.set_attribute(_QUERY, "hidden")
