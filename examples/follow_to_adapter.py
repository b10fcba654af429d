"""Trains an adapter with the openai client, follows the job, and ends with the adapter's files on disk, all verified.

export ESPALIER_URL=http://127.0.0.1:8000/v1 ESPALIER_API_KEY=esp_live_...
python examples/follow_to_adapter.py rows.jsonl adapter/ [BASE_MODEL]
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SILENT_SECONDS = 60  # the stream sends a comment every 15 s, so silence means that the connection is gone
GIVE_UP_AFTER = 20  # connections in a row that brought nothing


def main(rows: Path, directory: Path, base: str = DEFAULT_BASE) -> None:
    client = OpenAI(base_url=os.environ["ESPALIER_URL"], api_key=os.environ["ESPALIER_API_KEY"])
    with rows.open("rb") as content:
        file = client.files.create(file=content, purpose="fine-tune")
    if file.status == "error":
        sys.exit(f"{file.id} has problems: {file.status_details}")
    job = client.fine_tuning.jobs.create(model=base, training_file=file.id, hyperparameters={"n_epochs": 2})
    print(f"{job.id} is {job.status}")
    for event in follow(client, job.id):
        print(event["message"])
    job = client.fine_tuning.jobs.retrieve(job.id)
    if job.status != "succeeded":
        sys.exit(f"The job has {job.status}: {job.error.message if job.error else ''}")
    fetch_adapter(client, job.id, directory)
    print(f"{job.fine_tuned_model} is in {directory}")


def follow(client: OpenAI, job_id: str) -> Iterator[dict[str, Any]]:
    """Yield each event once, until the job has ended. A connection that breaks is taken up after the last event."""
    last_id, num_failures = "", 0
    while num_failures < GIVE_UP_AFTER:
        num_failures += 1
        try:
            for kind, event_id, event in read_stream(client, job_id, after=last_id):
                if kind == "end":
                    return
                last_id, num_failures = event_id, 0
                yield event
        except httpx.TransportError:
            continue
    sys.exit("The service cannot be reached.")


def read_stream(client: OpenAI, job_id: str, *, after: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the kind, the number and the object of each server-sent event of one connection."""
    headers = {"authorization": f"Bearer {client.api_key}", **({"last-event-id": after} if after else {})}
    url = f"{client.base_url}fine_tuning/jobs/{job_id}/stream"
    with httpx.stream("GET", url, headers=headers, timeout=SILENT_SECONDS) as answer:
        answer.raise_for_status()
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
                continue
            if "data" in fields:
                yield fields["event"], fields.get("id", after), json.loads(fields["data"])
            fields = {}


def fetch_adapter(client: OpenAI, job_id: str, directory: Path) -> None:
    """Download the job's adapter, each file by its presigned URL, and compare its hash."""
    directory.mkdir(parents=True, exist_ok=True)
    listed: Any = client.get("/adapters", cast_to=object, options={"params": {"limit": 100}})
    adapter = next(each for each in listed["data"] if each["fine_tuning_job_id"] == job_id)
    download: Any = client.get(f"/adapters/{adapter['id']}/download", cast_to=object)
    for file in download["files"]:
        content = httpx.get(file["url"], timeout=60).raise_for_status().content
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            sys.exit(f"{file['name']} arrived damaged.")
        (directory / file["name"]).write_bytes(content)
        print(f"{file['name']}: {file['size_bytes']} bytes, as stored")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])
