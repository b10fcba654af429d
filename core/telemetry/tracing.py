"""Traces, by OpenTelemetry over OTLP/HTTP. Made only if a collector's URL is set. Needs the extra `tracing`.

Without the URL no provider is made, and OpenTelemetry's SDK is not loaded. A submission is a trace of the API. Each
attempt is a trace of its own, perhaps hours later, with a link to the submission; the link is `traceparent` in the
job's row. Each process makes its own provider after its start.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from core.settings import TelemetrySettings

if TYPE_CHECKING:
    from opentelemetry.trace import Link, Span, Tracer

_NANOSECONDS = 1_000_000_000
_tracer: Tracer | None = None  # set by `configure_tracing` if there is a collector's URL


class TracingUnavailableError(Exception):
    """Traces are configured, but the packages that make them are not installed."""


def configure_tracing(process: str, settings: TelemetrySettings) -> None:
    """Send this process's spans to the collector in the settings, if there is one."""
    global _tracer  # noqa: PLW0603 (a process has one provider)
    if settings.otlp_endpoint is None:
        return
    if importlib.util.find_spec("opentelemetry.sdk") is None:
        raise TracingUnavailableError("ESPALIER_OTLP_ENDPOINT is set, and the extra `tracing` is not installed.")
    from opentelemetry import trace  # noqa: PLC0415 (not loaded where nobody asks for traces)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    from core.telemetry.discretion import QueryHider  # noqa: PLC0415

    provider = TracerProvider(resource=Resource.create({"service.name": f"espalier-{process}"}))
    exporter = OTLPSpanExporter(endpoint=f"{settings.otlp_endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(QueryHider())
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)  # FastAPI makes a span for each request once a provider exists
    _tracer = provider.get_tracer("espalier")


def current_traceparent() -> str | None:
    """Return the W3C traceparent of the current span, or None without one."""
    if _tracer is None:
        return None
    from opentelemetry import trace  # noqa: PLC0415

    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


class AttemptTrace:
    """The trace of one attempt: a root span, and one span for each phase. Does nothing if no collector is set."""

    def __init__(self, *, traceparent: str | None, began_at: float, attributes: Mapping[str, str | int]) -> None:
        self._span: Span | None = None
        if _tracer is None:
            return
        from opentelemetry.context import Context  # noqa: PLC0415

        self._span = _tracer.start_span(
            "attempt",
            context=Context(),  # without a parent it is a trace of its own
            links=_links_to(traceparent),
            attributes=attributes,
            start_time=int(began_at * _NANOSECONDS),
        )

    def add_phase(
        self, name: str, *, began_at: float, seconds: float, attributes: Mapping[str, str | int] | None = None
    ) -> None:
        """Add a phase that is over. `began_at` is in seconds, by the machine's clock."""
        if self._span is None or _tracer is None:
            return
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415

        span = _tracer.start_span(
            name,
            context=set_span_in_context(self._span),
            attributes=attributes,
            start_time=int(began_at * _NANOSECONDS),
        )
        span.end(end_time=int((began_at + seconds) * _NANOSECONDS))

    def end(self, outcome: str) -> None:
        if self._span is not None:
            self._span.set_attribute("espalier.outcome", outcome)
            self._span.end(end_time=int(time.time() * _NANOSECONDS))


def _links_to(traceparent: str | None) -> list[Link]:
    """Return a link to the span that a row names, or nothing if the row names none or an unreadable one."""
    from opentelemetry.trace import Link, get_current_span  # noqa: PLC0415
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    if traceparent is None:
        return []
    context = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": traceparent})).get_span_context()
    return [Link(context)] if context.is_valid else []
