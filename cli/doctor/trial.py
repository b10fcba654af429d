"""A real job from end to end: uploads a file, trains a tiny adapter, and downloads all of it.

Progress on standard error names the job, and says why it waits each time the reason changes.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
from sqlalchemy import Engine

from cli.doctor.findings import Finding, failed, ok
from cli.output import tell
from cli.owner import actor
from core.db.session import operator_transaction
from core.domain.api_keys import ALL_SCOPES, ApiKey
from core.domain.errors import NotFoundError
from core.domain.jobs import pool_name
from core.services.api_keys import issue_api_key, revoke_api_key
from core.services.oversight import WorkerOverview, list_worker_overviews
from core.services.tenants import create_tenant, find_tenant

TENANT = "espalier-doctor"
_KEY_LIFETIME = timedelta(days=1)
_TIMEOUT_SECONDS = 60
_POLL_SECONDS = 0.5
_EXPLAIN_SECONDS = 15.0
_MAX_WORKERS = 1000
_ENDED = ("succeeded", "failed", "cancelled")
_ROW = {"messages": [{"role": "user", "content": "Are you well?"}, {"role": "assistant", "content": "I am well."}]}
_JOB = {"hyperparameters": {"n_epochs": 1, "batch_size": 4}, "adapter": {"rank": 4}, "seed": 1, "suffix": "doctor"}
_REMEDY = "`espalier jobs --tenant espalier-doctor` shows it, and /explain why it waits."


class TrialError(Exception):
    """The trial cannot continue. The message says where it stopped."""


@dataclass(frozen=True)
class Trial:
    """What to train on and how long it may take. Without a base: one that a worker holds, or the first on offer."""

    base_model: str | None
    patience_seconds: float


def check_job(engine: Engine, api_url: str, trial: Trial) -> Finding:
    """Train a tiny adapter in a tenant of its own, download it, and delete everything again."""
    started = time.monotonic()
    try:
        api_key = _make_key(engine)
        try:
            with httpx.Client(
                base_url=f"{api_url.rstrip('/')}/v1",
                headers={"authorization": f"Bearer {api_key}"},
                timeout=_TIMEOUT_SECONDS,
                trust_env=False,
            ) as http:
                pool = _choose_pool(engine, http, trial.base_model)
                said = _run(http, pool, until=started + trial.patience_seconds)
        finally:
            _end_key(engine, api_key)
    except (TrialError, httpx.HTTPError) as error:
        return failed("job", str(error) or type(error).__name__, remedy=_REMEDY)
    return ok("job", f"{said} It took {time.monotonic() - started:.1f} s.")


def _make_key(engine: Engine) -> ApiKey:
    with operator_transaction(engine, actor=actor()) as session:
        try:
            tenant = find_tenant(session, TENANT)
        except NotFoundError:
            tenant = create_tenant(session, TENANT)
        return issue_api_key(session, tenant.id, name="doctor", scopes=ALL_SCOPES, lifetime=_KEY_LIFETIME).api_key


def _end_key(engine: Engine, api_key: ApiKey) -> None:
    with operator_transaction(engine, actor=actor()) as session:
        tenant = find_tenant(session, TENANT)
        revoke_api_key(session, tenant.id, key_id=api_key.key_id)


def _choose_pool(engine: Engine, http: httpx.Client, base_model: str | None) -> str:
    """Return the pool to train in. A base that a worker holds needs no load, which takes minutes for a large one."""
    offered = [str(each["id"]) for each in _ask(http, "GET", "/models")["data"]]
    wanted = [base_model] if base_model else [each for each in offered if not each.startswith("ft:")]
    if not wanted:
        raise TrialError("No base model is on offer to a new tenant.")
    with operator_transaction(engine, actor=actor()) as session:
        workers = list_worker_overviews(session, limit=_MAX_WORKERS).items
    held = [each.pool for each in sorted(workers, key=lambda each: each.slots_in_use) if each.pool and _holds(each)]
    return next((pool for pool in held if pool.partition("@")[0] in wanted), pool_name(wanted[0], None))


def _holds(worker: WorkerOverview) -> bool:
    return worker.is_alive and worker.state not in ("loading", "stopping") and worker.next_pool is None


def _run(http: httpx.Client, pool: str, *, until: float) -> str:
    base_model, _, quantization = pool.partition("@")
    rows = "\n".join(json.dumps(_ROW) for _ in range(4)).encode()
    sent = {"file": ("doctor.jsonl", rows)}
    file_id = _ask(http, "POST", "/files", files=sent, data={"purpose": "fine-tune"})["id"]
    try:
        body = {"model": base_model, "training_file": file_id, **_JOB}
        body |= {"quantization": None if quantization == "none" else quantization}
        job = _ask(http, "POST", "/fine_tuning/jobs", json=body)
        tell(f"Job {job['id']} was submitted: base {base_model}, pool {pool}.")
        job = _await_end(http, job, until=until)
        num_bytes = _fetch_adapter(http, job["id"])
        _ask(http, "DELETE", f"/models/{job['fine_tuned_model']}")
    finally:
        http.delete(f"/files/{file_id}")
    return f"{base_model}: trained {job['trained_steps']} steps; the adapter ({num_bytes} bytes) came down whole."


def _await_end(http: httpx.Client, job: dict[str, Any], *, until: float) -> dict[str, Any]:
    told, explained_at = "", -math.inf
    while job["status"] not in _ENDED:
        if time.monotonic() > until:
            reason = _find_reason(_explain(http, job))
            http.post(f"/fine_tuning/jobs/{job['id']}/cancel")
            raise TrialError(f"The job is still {job['status']} and was cancelled. {reason}".strip())
        if time.monotonic() - explained_at >= _EXPLAIN_SECONDS:
            explained, explained_at = _explain(http, job), time.monotonic()
            reason = _find_reason(explained) or f"The job is {explained['status']}."
            if reason != told:
                tell(reason)
            told = reason
        time.sleep(_POLL_SECONDS)
        job = _ask(http, "GET", f"/fine_tuning/jobs/{job['id']}")
    if job["status"] != "succeeded":
        raise TrialError(f"The job has {job['status']}: {job['error']['message']}")
    return job


def _explain(http: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    return _ask(http, "GET", f"/fine_tuning/jobs/{job['id']}/explain")


def _find_reason(explained: dict[str, Any]) -> str:
    """Return the service's own reason why a job waits, or an empty one if it does not wait."""
    return str((explained["reason"] or {}).get("message", ""))


def _fetch_adapter(http: httpx.Client, job_id: str) -> int:
    """Return the adapter's size in bytes. Each of its files was compared with its sha256."""
    adapters = _ask(http, "GET", "/adapters", params={"limit": 100})["data"]
    adapter = next(each for each in adapters if each["fine_tuning_job_id"] == job_id)
    num_bytes = 0
    for file in _ask(http, "GET", f"/adapters/{adapter['id']}/download")["files"]:
        content = httpx.get(file["url"], timeout=_TIMEOUT_SECONDS, trust_env=False).raise_for_status().content
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            raise TrialError(f"{file['name']} of the adapter came down damaged.")
        num_bytes += len(content)
    return num_bytes


def _ask(http: httpx.Client, verb: str, path: str, **options: Any) -> dict[str, Any]:
    answer = http.request(verb, path, **options)
    if not answer.is_success:
        told = answer.json().get("error", {}) if "json" in answer.headers.get("content-type", "") else {}
        raise TrialError(f"{verb} {path} is answered {answer.status_code}: {told.get('message', 'no reason given')}")
    found: dict[str, Any] = answer.json()
    return found
