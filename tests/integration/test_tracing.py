"""Traces are off until a collector is named."""

from __future__ import annotations

import subprocess
import sys

OFF = """
import sys
import api.main
from core.settings import TelemetrySettings
from core.telemetry.tracing import AttemptTrace, configure_tracing, current_traceparent
configure_tracing("api", TelemetrySettings(otlp_endpoint=None))
assert current_traceparent() is None
trace = AttemptTrace(traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01", began_at=0.0, attributes={})
trace.add_phase("claim", began_at=0.0, seconds=1.0)
trace.end("succeeded")
from opentelemetry import trace
makers = [name for name in sys.modules if name.startswith(("opentelemetry.sdk.trace", "opentelemetry.exporter"))]
print(makers, type(trace.get_tracer_provider()).__name__)
"""
ON = """
from core.settings import TelemetrySettings
from core.telemetry.tracing import AttemptTrace, _links_to, configure_tracing
configure_tracing("worker", TelemetrySettings(otlp_endpoint="http://127.0.0.1:9"))
good = "00-" + "1" * 32 + "-" + "2" * 16
print([len(_links_to(each)) for each in (good + "-01", good + "-00", good + "-ff", "nonsense", "", None)])
import os; os._exit(0)
"""


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_without_a_collector_there_is_no_provider_and_nothing_that_makes_traces_is_loaded() -> None:
    assert run(OFF) == "[] ProxyTracerProvider"


def test_a_job_whose_traceparent_cannot_be_read_is_traced_without_a_link() -> None:
    assert run(ON) == "[1, 1, 1, 0, 0, 0]"
