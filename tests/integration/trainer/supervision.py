"""The supervisor's end of a trainer's pipes, with a real loop and a real engine on a tiny base."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from core.domain.datasets.tokenizers import BaseTokenizer, TokenizerBundle
from core.domain.values import Frozen
from tests.integration.trainer.object_store import Store
from tests.unit.engine.tiny import ALL_MODULES, make_spec, tiny_llama
from tests.waiting import PATIENCE_SECONDS
from worker.engine import Engine, Example, SlotReport
from worker.engine.errors import ExampleTooLargeError
from worker.engine.evaluations import Score
from worker.engine.frozen import PackedWeight
from worker.engine.planner import SlotPlan
from worker.engine.slots import Slot
from worker.engine.updates import SlotSums
from worker.messages import (
    REPORTS,
    JobFacts,
    JobFailed,
    JobLogged,
    LoadBase,
    RemoteFile,
    RemoteResumePoint,
    Report,
    StartJob,
    UrlsGranted,
    UrlsWanted,
    encode_line,
)
from worker.trainer.bases import LoadedBase
from worker.trainer.channel import Channel
from worker.trainer.loop import TrainingLoop

SLOTS = 6
END = "<end>"
TEMPLATE = (
    f"{{% for message in messages %}}{{{{ message.role }}}}: {{{{ message.content }}}}{END}{{% endfor %}}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
R = TypeVar("R", bound=Frozen)


class FaultyEngine(Engine):
    """An engine in which the gradient of some steps, of whatever job, is not finite, or nothing can be evaluated."""

    bad_steps: Sequence[int] = ()
    can_evaluate = True

    def _score(self, slot: Slot, examples: Sequence[Example]) -> list[Score]:
        if not self.can_evaluate:
            raise ExampleTooLargeError("The test's device is full.")
        return super()._score(slot, examples)

    def _commit(
        self, plans: list[SlotPlan], sums: list[SlotSums], scored: tuple[SlotReport, ...]
    ) -> tuple[SlotReport, ...]:
        found = [
            each._replace(grad_norm=math.nan) if plan.slot.cursor.step + 1 in self.bad_steps else each
            for plan, each in zip(plans, sums, strict=True)
        ]
        return super()._commit(plans, found, scored)


class _OverError(Exception):
    """Ends a loop whose test is over."""


def _end_loop() -> None:
    raise _OverError


class Supervisor:
    """The other end of a trainer's pipes, with the trainer's loop on a thread."""

    def __init__(self, store: Store, scratch_dir: Path) -> None:
        self.store = store
        self.reports: list[Report] = []
        self.grants_uploads = True
        self.scratch_dir = scratch_dir
        # The trainer ends its process, which is the test's own, when this end of its orders is closed.
        orders, self._orders = os.pipe()
        reports, reports_end = os.pipe()
        self._lines = os.fdopen(reports, "rb")
        self._channel = Channel(
            os.fdopen(orders, "rb", closefd=False), os.fdopen(reports_end, "wb", buffering=0, closefd=False)
        )
        self.engine = FaultyEngine(
            tiny_llama(), base_model_id="tiny/llama", max_slots=SLOTS, max_rank=16, max_tokens_per_step=256
        )

    def start_loop(self) -> None:
        base = LoadedBase(tiny_llama(), make_tokenizer(), make_bundle(), revision="1", seconds=0.0)
        self.loop = TrainingLoop(self._channel, self.engine, base, make_base_order(), scratch_dir=self.scratch_dir)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(_OverError):
            self.loop.run()

    def stop_loop(self) -> None:
        self._channel.deliver(self._channel.run_in_background(_end_loop), lambda done: done.result())
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "the loop goes on"
        self._lines.close()

    def send(self, order: Frozen) -> None:
        os.write(self._orders, encode_line(order))

    @property
    def has_obeyed(self) -> bool:
        """False while an order has come that the loop has not taken yet."""
        return self._channel._inbox.empty()

    def wait_for(self, kind: type[R], lease_token: int = 1) -> R:
        """Read reports, and grant the uploads that they ask for, until there is one of this kind of the job."""
        for told in self.told(kind):
            if getattr(told, "lease_token", None) == lease_token:
                return told
        for report in self._read_reports():
            if isinstance(report, kind) and getattr(report, "lease_token", None) == lease_token:
                return report
            assert kind is JobFailed or not isinstance(report, JobFailed), report
        raise AssertionError

    def _read_reports(self) -> Iterator[Report]:
        for line in self._lines:
            report = REPORTS.validate_json(line)
            self.reports.append(report)
            if isinstance(report, UrlsWanted) and self.grants_uploads:
                self._grant(report)
            yield report

    def told(self, kind: type[R]) -> list[R]:
        return [report for report in self.reports if isinstance(report, kind)]

    def _grant(self, wanted: UrlsWanted) -> None:
        self.store.num_granted += wanted.artifact == "adapter"
        urls = {name: self.store.url(f"{wanted.artifact}/{name}") for name in wanted.names}
        self.send(UrlsGranted(lease_token=wanted.lease_token, artifact=wanted.artifact, urls=urls))


class HeldStep:
    """A step that stands still in the middle, as on a slow device, until it is let go on."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        product: str = "multiply",
        is_due: Callable[[], bool] = lambda: True,
    ) -> None:
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        self._num_products = 0
        self._is_due = is_due
        self._multiply = getattr(PackedWeight, product)
        monkeypatch.setattr(PackedWeight, product, lambda weight, rows: self._hold(weight, rows))

    def _hold(self, weight: PackedWeight, rows: torch.Tensor) -> torch.Tensor:
        self._num_products += self._is_due()
        if self._num_products == 3 and not self.has_begun.is_set():
            self.has_begun.set()
            self.may_go_on.wait()
        return self._multiply(weight, rows)  # type: ignore[no-any-return]


def make_bundle() -> TokenizerBundle:
    """A token a character."""
    letters = [chr(code) for code in range(32, 127)]
    backend = Tokenizer(WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="?"))
    backend.pre_tokenizer = Split("", "isolated")
    backend.add_special_tokens([AddedToken(END, special=True)])
    return TokenizerBundle(backend=backend.to_str(), chat_template=TEMPLATE, special_tokens={"eos_token": END})


def make_tokenizer() -> BaseTokenizer:
    return BaseTokenizer(make_bundle())


def make_base_order() -> LoadBase:
    return LoadBase(
        base_model_id="tiny/llama",
        source_kind="path",
        location="",
        revision="1",
        dtype="float32",
        quantization=None,
        target_modules=ALL_MODULES,
        chat_template=None,
        slots=SLOTS,
        max_rank=16,
        max_tokens_per_step=256,
        cache_dir="",
        resume_steps=1000,
        resume_seconds=1000,
        storage_patience_seconds=5,
    )


def make_order(
    training_file: RemoteFile,
    *,
    lease_token: int = 1,
    validation_file: RemoteFile | None = None,
    resume_points: tuple[RemoteResumePoint, ...] = (),
    **spec: Any,
) -> StartJob:
    return StartJob(
        lease_token=lease_token,
        tenant_id="acme",
        share=1.0,
        spec=make_spec(**{"n_epochs": 3, "batch_size": 2} | spec),
        facts=JobFacts(
            job_id="ftjob-1",
            tenant="acme",
            model_name="ft:tiny:acme::1",
            base_model_id="tiny/llama",
            base_revision="",
            quantization=None,
            created_at=0,
        ),
        training_file=training_file,
        validation_file=validation_file,
        resume_points=resume_points,
    )


def kept_in(scratch: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in scratch.glob(f"*/{pattern}"))


def wait_for_log(supervisor: Supervisor, name: str) -> None:
    """Read reports until the first job has logged this."""
    assert any(isinstance(report, JobLogged) and report.name == name for report in supervisor._read_reports())
