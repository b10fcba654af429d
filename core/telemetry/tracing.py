"""Traces, by OpenTelemetry over OTLP/HTTP: only where a collector's URL is set, and then the extra `tracing` is needed.

Without it no provider is made, and nothing of OpenTelemetry's that makes traces is loaded. A submission is a trace of
the API's; each attempt is a trace of its own, which may come hours later, with a link to the submission. `traceparent`
in a job's row is what links them. A provider is made by each process for itself, after it was started.
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
_tracer: Tracer | None = None  # once `configure_tracing` has been called with a collector's URL


class TracingUnavailableError(Exception):
    """Traces are asked for, and what makes them is not installed."""


def configure_tracing(process: str, settings: TelemetrySettings) -> None:
    """Send this process's spans to the collector that the settings name, if they name one."""
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
    trace.set_tracer_provider(provider)  # FastAPI makes a span of each request as soon as there is one
    _tracer = provider.get_tracer("espalier")


def current_traceparent() -> str | None:
    """Return the W3C name of the span that this is called in, or None without one."""
    if _tracer is None:
        return None
    from opentelemetry import trace  # noqa: PLC0415

    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


class AttemptTrace:
    """The trace of one attempt: a root span, and one span a phase. Nothing where no collector is set."""

    def __init__(self, *, traceparent: str | None, began_at: float, attributes: Mapping[str, str | int]) -> None:
        self._span: Span | None = None
        if _tracer is None:
            return
        from opentelemetry.context import Context  # noqa: PLC0415

        self._span = _tracer.start_span(
            "attempt",
            context=Context(),  # no parent: a trace of its own
            links=_links_to(traceparent),
            attributes=attributes,
            start_time=int(began_at * _NANOSECONDS),
        )

    def add_phase(
        self, name: str, *, began_at: float, seconds: float, attributes: Mapping[str, str | int] | None = None
    ) -> None:
        """Add a phase that is over; `began_at` is in seconds, by the machine's clock."""
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
    """Return a link to the span that a row names; none where the row names none, or what cannot be read."""
    from opentelemetry.trace import Link, get_current_span  # noqa: PLC0415
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    if traceparent is None:
        return []
    context = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": traceparent})).get_span_context()
    return [Link(context)] if context.is_valid else []
