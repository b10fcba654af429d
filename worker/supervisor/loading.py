"""Starts a trainer and lets it load a base, in two steps, or says why that is not possible.

The first step looks at the base's files, which takes seconds and little memory. Only the second reads its weights. A
trainer that fails a step, or takes too long for it, is ended here.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from worker.messages import BaseInspected, BaseLoaded, BaseRefused, LoadBase, LoadWeights
from worker.supervisor.children import TrainerChild, TrainerGoneError
from worker.supervisor.failures import explain_exit

_POLL_SECONDS = 0.1


class BaseUnusableError(Exception):
    """Why a base cannot be loaded, in words for its operator. With `is_worker_fault` another worker may load it."""

    def __init__(self, reason: str, *, is_worker_fault: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_worker_fault = is_worker_fault

    def __reduce__(self) -> tuple[object, ...]:
        return (_restore_error, (self.reason, self.is_worker_fault))


def _restore_error(reason: str, is_worker_fault: bool) -> BaseUnusableError:  # noqa: FBT001 (pickle passes by place)
    return BaseUnusableError(reason, is_worker_fault=is_worker_fault)


@dataclass(frozen=True)
class InspectedBase:
    """A trainer that has looked at its base and waits, and the path of the base's tokenizer."""

    trainer: TrainerChild
    tokenizer_path: Path


class TrainerStarter:
    """Starts trainers. `stop_requested` ends every wait; the result is then None."""

    def __init__(
        self,
        *,
        threads: int | None,
        scratch_dir: Path | None,
        patience_seconds: float,
        stop_requested: threading.Event,
    ) -> None:
        self._threads = threads
        self._scratch_dir = scratch_dir
        self._patience_seconds = patience_seconds
        self._stop_requested = stop_requested

    def inspect(self, order: LoadBase) -> InspectedBase | None:
        """Start a trainer and let it look at the base. Raises BaseUnusableError."""
        try:
            trainer = TrainerChild(order, threads=self._threads, scratch_dir=self._scratch_dir)
        except OSError as error:
            raise BaseUnusableError(f"No trainer can be started: {error}", is_worker_fault=True) from error
        report = self._await(trainer)
        return InspectedBase(trainer, Path(report.tokenizer_path)) if isinstance(report, BaseInspected) else None

    def load_weights(self, trainer: TrainerChild) -> BaseLoaded | None:
        """Let a trainer that has looked at its base load it. Raises BaseUnusableError."""
        trainer.send(LoadWeights())
        report = self._await(trainer)
        return report if isinstance(report, BaseLoaded) else None

    def _await(self, trainer: TrainerChild) -> BaseInspected | BaseLoaded | None:
        deadline = time.monotonic() + self._patience_seconds
        report = None
        try:
            while report is None and time.monotonic() < deadline and not self._stop_requested.is_set():
                report = trainer.receive(timeout_seconds=_POLL_SECONDS)
        except TrainerGoneError as error:
            trainer.close()
            told = f"{explain_exit(error.exit_code).message} Its log may say why."
            raise BaseUnusableError(told, is_worker_fault=True) from error
        if isinstance(report, BaseInspected | BaseLoaded):
            return report
        trainer.kill()
        trainer.close()
        if isinstance(report, BaseRefused):
            raise BaseUnusableError(report.message, is_worker_fault=report.is_worker_fault)
        if not self._stop_requested.is_set():
            told = f"It was not loaded within {self._patience_seconds:.0f} s."
            raise BaseUnusableError(told, is_worker_fault=True)
        return None
