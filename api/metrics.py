"""The API's Prometheus metrics. No label has a value that a client can choose, and none names a tenant.

Several processes write to files of one directory, and their parent adds them up (see `processes`). So there are
counters, histograms, and gauges that say how they add up. A labelled metric is looked up once and kept, for speed.
"""

from __future__ import annotations

import functools

from prometheus_client import Counter, Gauge, Histogram

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ANSWER_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

_REQUESTS = Counter(
    "espalier_http_requests", "Requests answered, by route template and class of status.", ("method", "route", "status")
)
_ANSWER_SECONDS = Histogram(
    "espalier_http_answer_seconds", "Seconds until an answer started.", ("route",), buckets=_ANSWER_BUCKETS
)
_REFUSED = Counter(
    "espalier_requests_refused", "Requests refused, by the code of the error object that said why.", ("reason",)
)
_REFUSED.labels("rate_limit_exceeded")  # at zero from the start, so that the first refusal is an increase
STORED_DATASETS = Counter("espalier_uploads", "Datasets stored, by what the check of their rows found.", ("outcome",))
STORED_BYTES = Counter("espalier_upload_bytes", "Bytes of the datasets stored.")
OPEN_STREAMS = Gauge("espalier_open_streams", "Event streams that are open now.", multiprocess_mode="livesum")


def count_answer(method: str, route: str, status: int, *, seconds: float) -> None:
    requests, answer_seconds = _find_figures(method if method in _METHODS else "other", route, f"{status // 100}xx")
    requests.inc()
    answer_seconds.observe(seconds)


@functools.cache
def _find_figures(method: str, route: str, status: str) -> tuple[Counter, Histogram]:
    return _REQUESTS.labels(method, route, status), _ANSWER_SECONDS.labels(route)


@functools.cache
def _find_refusal(reason: str) -> Counter:
    return _REFUSED.labels(reason)


def count_refusal(reason: str) -> None:
    """Count a refusal. `reason` is one of the service's own error codes."""
    _find_refusal(reason).inc()
