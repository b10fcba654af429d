"""One attempt at a job, shared by the training loop and the background threads.

It is immutable, with one exception: it is called off once, when its job is stopped. Background work checks this before
each chunk, row and wait, and then ends.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from worker.messages import JobLogged, JobWarned, PhaseDone, StartJob
from worker.trainer.bases import LoadedBase
from worker.trainer.channel import Channel
from worker.trainer.failures import JobStoppedError
from worker.trainer.phases import Phase
from worker.trainer.transfers import Patience


@dataclass(frozen=True, eq=False)
class Attempt:
    """The order, the base and the place of the files. Any thread may send its reports."""

    order: StartJob
    base: LoadedBase
    channel: Channel
    directory: Path
    storage_patience_seconds: float
    is_called_off: threading.Event = field(default_factory=threading.Event)

    @property
    def lease_token(self) -> int:
        return self.order.lease_token

    @property
    def ids(self) -> dict[str, str | int]:
        """The ids of this attempt in lines of the process's log."""
        return {
            "job_id": self.order.facts.job_id,
            "lease_token": self.lease_token,
            "tenant_id": self.order.tenant_id,
        }

    @property
    def patience(self) -> Patience:
        """How long the object store is tried: no longer than the attempt is wanted."""
        return Patience(self.storage_patience_seconds, check=self.check_wanted)

    def check_wanted(self) -> None:
        """Raise JobStoppedError once the attempt is called off."""
        if self.is_called_off.is_set():
            raise JobStoppedError("The job was stopped.")

    def call_off(self) -> None:
        """Let its background work end at the next chunk, row or wait."""
        self.is_called_off.set()
        self.channel.refuse_urls(self.lease_token)

    def log(self, name: str, **details: str | float | None) -> None:
        """Write a line into the job's own log."""
        self.channel.send(JobLogged(lease_token=self.lease_token, name=name, details=details))

    def warn(self, message: str) -> None:
        self.channel.send(JobWarned(lease_token=self.lease_token, message=message))

    def report_phase(self, phase: Phase, *, artifact: str | None = None, size_bytes: int = 0) -> PhaseDone:
        done = phase.end(self.lease_token, artifact=artifact, size_bytes=size_bytes)
        self.channel.send(done)
        return done
