"""A trainer's loop with a real engine on a tiny base; the test is its supervisor, and its object store."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from core.domain.datasets.tokenizers import BaseTokenizer, TokenizerBundle
from core.domain.values import Frozen
from tests.unit.engine.tiny import ALL_MODULES, make_spec, tiny_llama
from tests.waiting import PATIENCE_SECONDS, repeat_until, wait_until
from worker.engine import CURSOR_FILE, TENSORS_FILE, Engine, Example, SlotReport
from worker.engine.errors import ExampleTooLargeError
from worker.engine.evaluations import Score
from worker.engine.frozen import PackedWeight
from worker.engine.planner import SlotPlan
from worker.engine.slots import Slot
from worker.engine.updates import SlotSums
from worker.messages import (
    REPORTS,
    Alive,
    CheckpointSaved,
    DatasetsRead,
    DeviceLeft,
    EvaluationDone,
    JobFacts,
    JobFailed,
    JobLogged,
    JobStarted,
    JobSucceeded,
    JobWarned,
    JobYielded,
    LoadBase,
    RemoteFile,
    RemoteResumePoint,
    Report,
    ResumePointSaved,
    SlotRefused,
    StartJob,
    StepDone,
    StepSkipped,
    StopJob,
    UrlsGranted,
    UrlsWanted,
    UsageCounted,
    YieldJob,
    encode_line,
)
from worker.trainer.bases import LoadedBase
from worker.trainer.channel import Channel
from worker.trainer.loop import TrainingLoop
from worker.trainer.resume import PROGRESS_FILE, RESUME_FILES

SLOTS = 6
ENDLESS = "endless"
END = "<end>"
TEMPLATE = (
    f"{{% for message in messages %}}{{{{ message.role }}}}: {{{{ message.content }}}}{END}{{% endfor %}}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
R = TypeVar("R", bound=Frozen)


class Store(ThreadingHTTPServer):
    """Objects by path, and who has asked for what. A GET waits for as long as `is_open` is not set.

    An upload below `held` waits until it is below it no more; `watch` is called at every upload.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _StoreRequest)
        self.objects: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.refused: str | None = None  # uploads and downloads below this path
        self.refusal: tuple[HTTPStatus, bytes] = (HTTPStatus.FORBIDDEN, b"")
        self.num_granted = 0
        self.num_refused = 0
        self.num_to_refuse = math.inf
        self.held: str | None = None
        self.watch: Callable[[], object] = lambda: None
        self.is_open = threading.Event()
        self.is_open.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def add(self, path: str, content: bytes) -> RemoteFile:
        self.objects[f"/{path}"] = content
        return RemoteFile(url=self.url(path), sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))

    def add_rows(self, path: str, *, num_rows: int = 2) -> RemoteFile:
        rows = [
            [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}] for n in range(num_rows)
        ]
        return self.add(path, "\n".join(json.dumps({"messages": row}) for row in rows).encode())

    def add_conversations(self, path: str, turns: Sequence[tuple[str, str]]) -> RemoteFile:
        """Store rows of a question and its answer each."""
        rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
        return self.add(path, "\n".join(json.dumps({"messages": row}) for row in rows).encode())


class _StoreRequest(BaseHTTPRequestHandler):
    server: Store

    def do_GET(self) -> None:
        self.server.fetched.append(self.path)
        self.server.is_open.wait()
        if self._is_refused():
            self._answer(*self.server.refusal)
            return
        if self.path == f"/{ENDLESS}":
            self._drip()
            return
        content = self.server.objects.get(self.path)
        self._answer(HTTPStatus.NOT_FOUND if content is None else HTTPStatus.OK, content or b"")

    def do_PUT(self) -> None:
        self.server.watch()
        content = self.rfile.read(int(self.headers["content-length"]))
        wait_until(lambda: self.server.held is None or not self.path.startswith(self.server.held))
        if self._is_refused() and self.server.num_refused < self.server.num_to_refuse:
            self.server.num_refused += 1
            self._answer(*self.server.refusal)
            return
        self.server.objects[self.path] = content
        self._answer(HTTPStatus.OK, b"")

    def _is_refused(self) -> bool:
        return self.server.refused is not None and self.path.startswith(self.server.refused)

    def _drip(self) -> None:
        self.send_response(HTTPStatus.OK)
        self.end_headers()
        with suppress(ConnectionError):
            repeat_until(lambda: False, lambda: self.wfile.write(bytes(2**20)))

    def _answer(self, status: HTTPStatus, content: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: Any) -> None:
        pass


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
        for report in self.told(kind):
            if getattr(report, "lease_token", None) == lease_token:
                return report
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


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as made:
        yield made
        made.is_open.set()
        made.shutdown()


@pytest.fixture
def supervisor(store: Store, tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(store, tmp_path)
    made.start_loop()
    yield made
    made.stop_loop()


@pytest.mark.parametrize(("bad_steps", "checkpoints"), [((2,), [1, 3]), ((1,), [2, 3]), ((3,), [1, 2]), ((2, 3), [1])])
def test_an_epoch_whose_every_step_was_skipped_stores_no_checkpoint_and_costs_nothing(
    supervisor: Supervisor, store: Store, bad_steps: tuple[int, ...], checkpoints: list[int]
) -> None:
    supervisor.engine.bad_steps = bad_steps
    rows = store.add_rows("rows")  # one step an epoch
    supervisor.send(make_order(rows, validation_file=rows))
    done = supervisor.wait_for(JobSucceeded)
    assert [report.step for report in supervisor.told(CheckpointSaved)] == checkpoints
    assert [report.step for report in supervisor.told(EvaluationDone)] == checkpoints
    assert [report.step for report in supervisor.told(StepSkipped)] == list(bad_steps)
    steps = supervisor.told(StepDone) + supervisor.told(StepSkipped)
    assert sorted(report.step for report in steps) == [1, 2, 3], "progress reaches the end"
    assert {report.total_steps for report in (*steps, *supervisor.told(JobStarted))} == {3}
    weights = store.objects[f"/checkpoints/step-{checkpoints[-1]}/adapter_model.safetensors"]
    assert hashlib.sha256(weights).hexdigest() in {file.sha256 for file in done.adapter_files}


def test_the_steps_are_those_of_the_rows_that_are_left_and_what_became_of_the_others_is_counted(
    supervisor: Supervisor, store: Store
) -> None:
    """Of six rows one keeps a part of its answer within 40 tokens, and one keeps none."""
    rows = store.add_conversations("rows", [("say", "1")] * 4 + [("say", "1" * 60), ("say " * 20, "1")])
    supervisor.send(make_order(rows, validation_file=rows, n_epochs=2, batch_size=1, max_seq_len=40))
    supervisor.wait_for(JobSucceeded)
    (started,) = supervisor.told(JobStarted)
    assert started.total_steps == 10
    assert supervisor.told(StepDone)[-1].step == 10
    (read,) = supervisor.told(DatasetsRead)
    assert (read.training.num_examples, read.training.num_truncated, read.training.num_dropped) == (5, 2, 1)
    assert read.validation == read.training
    assert not supervisor.told(JobWarned), "the warning is the supervisor's, who knows whether it was given before"


@pytest.mark.parametrize("n_epochs", [1, 2, 3])
def test_a_job_whose_every_step_was_skipped_has_diverged_and_leaves_no_adapter(
    supervisor: Supervisor, store: Store, n_epochs: int
) -> None:
    supervisor.engine.bad_steps = range(1, 10)
    supervisor.send(make_order(store.add_rows("rows"), n_epochs=n_epochs))
    failed = supervisor.wait_for(JobFailed)
    assert (failed.code, failed.is_job_fault) == ("diverged", True)
    assert list(store.objects) == ["/rows"]


def test_a_validation_that_does_not_fit_fails_its_job_although_the_step_did_nothing_else(
    supervisor: Supervisor, store: Store
) -> None:
    supervisor.engine.can_evaluate = False
    rows = store.add_rows("rows")
    supervisor.send(make_order(rows, validation_file=rows))
    failed = supervisor.wait_for(JobFailed)
    assert (failed.code, failed.is_job_fault, failed.param) == ("oom_gpu", True, "validation_file")
    assert failed.message == "In the validation file: The test's device is full."
    supervisor.send(make_order(rows, lease_token=2))
    supervisor.wait_for(JobSucceeded, 2)


def break_hash(file: RemoteFile) -> RemoteFile:
    return file.model_copy(update={"sha256": "0" * 64})


def lose(file: RemoteFile) -> RemoteFile:
    return file.model_copy(update={"url": file.url + "-that-is-not-there"})


ROW = b'{"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "1"}]}'
SECRET = b'{"messages": [{"role": "user", "content": "sesame"}, {"role": "assistant", "content": 7}]}'


@pytest.mark.parametrize("name", ["training", "validation"])
@pytest.mark.parametrize(
    ("content", "change", "code", "words", "place"),
    [
        (
            ROW + b"\n" + SECRET,
            None,
            "invalid_training_data",
            "Line 2 of the {} file, messages[1].content: ",
            {"line": 2, "field": "messages[1].content"},
        ),
        (b"", None, "invalid_training_data", "The {} file has no rows.", {}),
        (ROW.replace(b'"1"', b'"%s"' % (b"1" * 300)), None, "invalid_job", "In the {} file: An example has ", {}),
        (ROW, break_hash, "integrity", "The {} file could not be fetched: Its bytes are not", {}),
        (ROW, lose, "storage_refused", "The {} file could not be fetched: The object store answered 404", {}),
    ],
    ids=["line", "empty", "too long", "damaged", "missing"],
)
def test_what_is_wrong_with_a_file_names_the_file(
    supervisor: Supervisor,
    store: Store,
    name: str,
    content: bytes,
    change: Callable[[RemoteFile], RemoteFile] | None,
    code: str,
    words: str,
    place: dict[str, Any],
) -> None:
    files = {"training": store.add_rows("rows"), "validation": store.add_rows("others")}
    files[name] = store.add("bad", content)
    if change is not None:
        files[name] = change(files[name])
    supervisor.send(make_order(files["training"], validation_file=files["validation"], max_seq_len=500))
    failed = supervisor.wait_for(JobFailed)
    assert failed.message.startswith(words.format(name)), failed.message
    assert (failed.code, failed.param) == (code, f"{name}_file")
    (line,) = [report for report in supervisor.told(JobLogged) if report.name == "job.failed"]
    assert line.details == {"code": code, "file": name, **place}
    assert "sesame" not in failed.message


def test_an_artifact_that_cannot_be_stored_is_named(supervisor: Supervisor, store: Store) -> None:
    store.refused = "/adapter/"
    supervisor.send(make_order(store.add_rows("rows"), n_epochs=1))
    failed = supervisor.wait_for(JobFailed)
    assert failed.message == "The adapter could not be stored: The object store answered 403."
    assert (failed.code, failed.param) == ("storage_url_refused", None)
    assert store.num_granted == 3, "URLs are asked for anew, twice"


# What S3 answers to a URL that it does not take.
EXPIRED = (HTTPStatus.BAD_REQUEST, b"<Error><Code>ExpiredToken</Code><Message>It has expired.</Message></Error>")
DENIED = (HTTPStatus.FORBIDDEN, b"<Error><Code>AccessDenied</Code></Error>")


@pytest.mark.parametrize("refusal", [EXPIRED, DENIED], ids=["expired token", "denied"])
@pytest.mark.parametrize("refused", ["/rows", "/valid", "/point/", "/adapter/"])
def test_a_url_that_the_store_refuses_ends_its_own_job_only_and_says_so(
    supervisor: Supervisor, store: Store, refused: str, refusal: tuple[HTTPStatus, bytes]
) -> None:
    store.refused, store.refusal = refused, refusal
    files = {name: store.add(f"point/{name}", b"{}") for name in RESUME_FILES}
    order = make_order(
        store.add_rows("rows"),
        validation_file=store.add_rows("valid"),
        resume_points=(RemoteResumePoint(step=1, files=files),) if refused == "/point/" else (),
        n_epochs=1,
    )
    supervisor.send(order)
    failed = supervisor.wait_for(JobFailed)
    assert (failed.code, failed.is_job_fault) == ("storage_url_refused", False)
    assert failed.message.endswith(f": The object store answered {refusal[0]}."), failed.message
    store.refused = None
    supervisor.send(make_order(store.add_rows("next"), lease_token=2, n_epochs=1))
    supervisor.wait_for(JobSucceeded, 2)


def test_a_400_that_says_nothing_of_the_url_is_a_refusal_of_the_request(supervisor: Supervisor, store: Store) -> None:
    store.refused, store.refusal = "/rows", (HTTPStatus.BAD_REQUEST, b"<Error><Code>InvalidRequest</Code></Error>")
    supervisor.send(make_order(store.add_rows("rows")))
    assert supervisor.wait_for(JobFailed).code == "storage_refused"


def test_an_artifact_whose_urls_have_expired_is_stored_under_new_ones(supervisor: Supervisor, store: Store) -> None:
    store.refused, store.num_to_refuse = "/adapter/", 2
    supervisor.send(make_order(store.add_rows("rows"), n_epochs=1))
    supervisor.wait_for(JobSucceeded)
    assert (store.num_refused, store.num_granted) == (2, 3)


def test_a_job_is_given_back_while_all_the_other_slots_prepare(supervisor: Supervisor, store: Store) -> None:
    supervisor.send(make_order(store.add_rows("rows", num_rows=100), n_epochs=50))
    supervisor.wait_for(JobStarted)
    store.is_open.clear()
    for number in range(2, SLOTS + 1):
        supervisor.send(make_order(store.add_rows(f"rows-{number}"), lease_token=number))
    asked_for = ["/rows", *(f"/rows-{number}" for number in range(2, SLOTS + 1))]
    wait_until(lambda: sorted(store.fetched) == asked_for, what="a question for every file")
    supervisor.send(YieldJob(lease_token=1))
    supervisor.wait_for(JobYielded)
    assert not store.is_open.is_set()
    assert any(path.startswith("/resume/") for path in store.objects)
    store.is_open.set()
    for number in range(2, SLOTS + 1):
        supervisor.wait_for(JobSucceeded, number)


@pytest.mark.parametrize("is_back", [True, False])
def test_a_job_whose_last_resume_point_was_not_stored_stores_it_again_before_it_is_given_back(
    supervisor: Supervisor, store: Store, monkeypatch: pytest.MonkeyPatch, *, is_back: bool
) -> None:
    store.refused = "/resume/"
    slots = supervisor.engine._slots
    held = HeldStep(monkeypatch, is_due=lambda: "1" in slots and slots["1"].cursor.step == 1)
    supervisor.send(make_order(store.add_rows("rows"), n_epochs=50))  # one step an epoch, each with a resume point
    held.has_begun.wait()
    assert "resume point of step 1 could not be stored" in supervisor.wait_for(JobWarned).message
    store.refused = None if is_back else "/resume/"
    supervisor.send(YieldJob(lease_token=1))
    wait_until(lambda: not supervisor.has_obeyed)
    held.may_go_on.set()
    supervisor.wait_for(JobYielded)
    assert [report.step for report in supervisor.told(ResumePointSaved)] == ([1] if is_back else [])
    assert len(supervisor.told(JobWarned)) == (1 if is_back else 2)


def test_jobs_that_were_stopped_while_they_prepared_keep_no_slot_of_others(
    supervisor: Supervisor, store: Store
) -> None:
    rows, large = store.add_rows("rows"), store.add_rows("large", num_rows=300_000)
    for number in range(1, SLOTS + 1):
        supervisor.send(make_order(rows, validation_file=large, lease_token=number))
    for number in range(1, SLOTS + 1):
        supervisor.wait_for(JobLogged, number)
    # Until each tokenises its other file, which takes minutes.
    wait_until(lambda: sum(file.path.endswith("validation.jsonl") for file in psutil.Process().open_files()) == SLOTS)
    for number in range(1, SLOTS + 1):
        supervisor.send(StopJob(lease_token=number))
    supervisor.send(make_order(rows, lease_token=SLOTS + 1))
    supervisor.wait_for(JobSucceeded, SLOTS + 1)


def test_everything_is_fetched_before_anything_is_tokenised(supervisor: Supervisor, store: Store) -> None:
    bad = store.add("bad", b"no row at all")  # which is found out when it is tokenised
    progress = b'{"trained_tokens": 0, "is_epoch_open": false, "rows": []}'
    contents = {CURSOR_FILE: b'{"format": "espalier-slot-2"}', PROGRESS_FILE: progress, TENSORS_FILE: b"{}"}
    point = RemoteResumePoint(step=1, files={name: store.add(name, each) for name, each in contents.items()})
    supervisor.send(make_order(bad, validation_file=store.add_rows("valid"), resume_points=(point,)))
    assert supervisor.wait_for(JobFailed).code == "invalid_training_data"
    assert store.fetched == ["/bad", "/valid", *(f"/{name}" for name in contents)]


def stored_point(store: Store, step: int, changes: dict[str, bytes | None]) -> RemoteResumePoint:
    """Return a stored point, with a copy of each file that is changed, and without those that are None."""
    contents = {name: store.objects[f"/resume/step-{step}/{name}"] for name in RESUME_FILES} | changes
    files = {name: store.add(f"again-{step}/{name}", each) for name, each in contents.items() if each is not None}
    return RemoteResumePoint(step=step, files=files)


@pytest.mark.parametrize("num_older", [0, 1])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({CURSOR_FILE: b'{"format": "espalier-slot-99"}'}, "It is of format espalier-slot-99, which another version"),
        ({PROGRESS_FILE: b'{"format": "espalier-resume-99"}'}, "Its progress is of a format that another version"),
        ({CURSOR_FILE: None, TENSORS_FILE: None}, "Its files are those of another version"),
    ],
    ids=["slot", "progress", "files"],
)
def test_a_resume_point_that_another_version_wrote_is_passed_over_in_one_sentence(
    supervisor: Supervisor, store: Store, changes: dict[str, bytes | None], told: str, num_older: int
) -> None:
    supervisor.send(make_order(store.add_rows("rows"), n_epochs=20))  # one step an epoch, each with a resume point
    while len(supervisor.told(ResumePointSaved)) < 2:
        next(supervisor._read_reports())
    supervisor.send(StopJob(lease_token=1))
    older, newer = (report.step for report in supervisor.told(ResumePointSaved)[:2])
    points = (stored_point(store, newer, changes), stored_point(store, older, {}))[: 1 + num_older]
    supervisor.send(make_order(store.add_rows("rows"), n_epochs=20, lease_token=2, resume_points=points))
    assert supervisor.wait_for(JobStarted, 2).step == (older if num_older else 0)
    supervisor.wait_for(JobSucceeded, 2)
    first, *others = [report.message for report in supervisor.told(JobWarned) if report.lease_token == 2]
    assert first.startswith(f"The resume point of step {newer} cannot be used: {told}")
    assert others == ([] if num_older else ["No resume point can be used; the job starts from its first step."])


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


@pytest.mark.parametrize("product", ["multiply", "multiply_back"])
@pytest.mark.parametrize("order", [StopJob, YieldJob])
def test_an_order_that_comes_in_the_middle_of_a_step_is_obeyed_before_its_end(
    supervisor: Supervisor,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    order: type[StopJob | YieldJob],
    product: str,
) -> None:
    held = HeldStep(monkeypatch, product=product)
    supervisor.send(make_order(store.add_rows("rows", num_rows=20), n_epochs=50))
    held.has_begun.wait()
    supervisor.send(order(lease_token=1))
    wait_until(lambda: not supervisor.has_obeyed)
    held.may_go_on.set()
    supervisor.wait_for(DeviceLeft)
    assert not supervisor.told(StepDone)
    supervisor.send(make_order(store.add_rows("next"), lease_token=2))
    supervisor.wait_for(JobSucceeded, 2)
    assert {report.lease_token for report in supervisor.told(StepDone)} == {2}
    assert bool(supervisor.told(JobYielded)) == (order is YieldJob)


@pytest.mark.parametrize("order", [StopJob, YieldJob])
def test_a_job_that_leaves_within_a_step_of_others_is_billed_its_part_of_the_step(
    supervisor: Supervisor, store: Store, monkeypatch: pytest.MonkeyPatch, order: type[StopJob | YieldJob]
) -> None:
    monkeypatch.setattr("worker.engine.steps.PATIENCE_SECONDS", PATIENCE_SECONDS)  # the step is not given up
    held = HeldStep(monkeypatch, is_due=lambda: set(supervisor.engine.running_names) == {"1", "2"})
    rows = store.add_rows("rows", num_rows=100)
    for number in (1, 2):
        supervisor.send(make_order(rows, lease_token=number, n_epochs=50))
    held.has_begun.wait()
    supervisor.wait_for(JobStarted, 2)
    supervisor.send(order(lease_token=2))
    wait_until(lambda: not supervisor.has_obeyed)
    held.may_go_on.set()
    supervisor.wait_for(DeviceLeft, 2)
    if order is YieldJob:
        supervisor.wait_for(JobYielded, 2)
    supervisor.send(StopJob(lease_token=1))
    supervisor.wait_for(DeviceLeft, 1)
    told = [report for report in supervisor.reports if isinstance(report, UsageCounted | JobYielded)]
    billed = [report for report in told if report.lease_token == 2]
    if order is YieldJob:
        assert isinstance(billed.pop(), JobYielded), "nothing is counted any more after it"
    assert isinstance(billed[-1], UsageCounted)
    assert billed[-1].gpu_seconds > 0


def test_a_step_that_goes_on_for_long_shows_that_it_lives(
    supervisor: Supervisor, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldStep(monkeypatch)
    supervisor.send(make_order(store.add_rows("rows"), n_epochs=1))
    held.has_begun.wait()
    monkeypatch.setattr("worker.trainer.loop._LIFE_SECONDS", 0.0)  # as if the step had gone on for longer
    held.may_go_on.set()
    started, done = (supervisor.reports.index(supervisor.wait_for(kind)) for kind in (JobStarted, StepDone))
    alive = [report for report in supervisor.reports[started:done] if isinstance(report, Alive)]
    assert len(alive) > 3, "at every look within the step, and not only before it"


def test_a_job_stopped_while_it_waits_for_a_slot_leaves_at_once_and_never_starts(
    supervisor: Supervisor, store: Store
) -> None:
    supervisor.engine._max_slots = 1
    supervisor.send(make_order(store.add_rows("rows", num_rows=100), n_epochs=50))
    supervisor.wait_for(JobStarted)
    supervisor.send(make_order(store.add_rows("next"), lease_token=2))
    supervisor.wait_for(JobLogged, 2)  # its dataset is there
    supervisor.send(StopJob(lease_token=2))
    supervisor.wait_for(DeviceLeft, 2)
    supervisor.send(StopJob(lease_token=1))
    supervisor.wait_for(DeviceLeft, 1)
    assert [report.lease_token for report in supervisor.told(JobStarted)] == [1]


def test_a_job_that_waited_for_memory_and_whose_scratch_disk_breaks_fails_alone(
    supervisor: Supervisor, store: Store
) -> None:
    supervisor.engine._max_slots = 1
    supervisor.send(make_order(store.add_rows("rows", num_rows=100), n_epochs=50))
    supervisor.wait_for(JobStarted)
    progress = b'{"trained_tokens": 0, "is_epoch_open": false, "rows": []}'
    contents = {TENSORS_FILE: b"no tensors", CURSOR_FILE: b'{"format": "espalier-slot-2"}', PROGRESS_FILE: progress}
    point = RemoteResumePoint(step=1, files={name: store.add(name, each) for name, each in contents.items()})
    supervisor.send(make_order(store.add_rows("next"), lease_token=2, resume_points=(point,)))
    supervisor.wait_for(SlotRefused, 2)
    supervisor.send(StopJob(lease_token=1))
    failed = supervisor.wait_for(JobFailed, 2)
    assert (failed.code, failed.is_job_fault) == ("worker_disk", False)
    supervisor.send(make_order(store.add_rows("third"), lease_token=3, n_epochs=1))
    supervisor.wait_for(JobSucceeded, 3)


def test_jobs_stopped_while_they_download_keep_no_thread_from_others(supervisor: Supervisor, store: Store) -> None:
    rows = store.add_rows("rows")
    endless = RemoteFile(url=store.url(ENDLESS), sha256="0" * 64, size_bytes=1)
    for number in range(1, SLOTS + 1):
        supervisor.send(make_order(endless, lease_token=number))
    wait_until(lambda: store.fetched == [f"/{ENDLESS}"] * SLOTS)
    for number in range(1, SLOTS + 1):
        supervisor.send(StopJob(lease_token=number))
        supervisor.wait_for(DeviceLeft, number)
    supervisor.send(make_order(rows, lease_token=SLOTS + 1))
    supervisor.wait_for(JobSucceeded, SLOTS + 1)


def test_jobs_stopped_while_they_wait_for_an_upload_keep_no_thread_from_others(
    supervisor: Supervisor, store: Store
) -> None:
    rows = store.add_rows("rows")
    supervisor.grants_uploads = False  # as a supervisor does that has dropped the job
    for number in range(1, SLOTS + 1):
        supervisor.send(make_order(rows, lease_token=number, n_epochs=1))
        supervisor.wait_for(DeviceLeft, number)  # it is trained
    supervisor.grants_uploads = True
    for number in range(1, SLOTS + 1):
        supervisor.send(StopJob(lease_token=number))
    supervisor.send(make_order(rows, lease_token=SLOTS + 1, n_epochs=1))
    supervisor.wait_for(JobSucceeded, SLOTS + 1)


def kept_in(scratch: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in scratch.glob(f"*/{pattern}"))


@pytest.mark.parametrize("refused", [None, "/checkpoints/"])
def test_the_scratch_directory_of_a_job_of_many_epochs_holds_two_adapters_at_most(
    supervisor: Supervisor, store: Store, refused: str | None
) -> None:
    store.refused = refused
    counts: list[int] = []
    store.watch = lambda: counts.append(len(kept_in(supervisor.scratch_dir, "step-*")))
    supervisor.send(make_order(store.add_rows("rows"), n_epochs=50))
    done = supervisor.wait_for(JobSucceeded)
    assert max(counts) == 2
    assert len(counts) >= 50
    stored = [report.step for report in supervisor.told(CheckpointSaved)]
    assert stored == ([] if refused else list(range(1, 51))), "no epoch is left out for want of room"
    weights = store.objects["/adapter/adapter_model.safetensors"]
    assert hashlib.sha256(weights).hexdigest() in {file.sha256 for file in done.adapter_files}


def test_a_job_whose_checkpoints_are_stored_late_keeps_their_files_and_rests_while_others_train(
    supervisor: Supervisor, store: Store
) -> None:
    store.held = "/checkpoints/step-1/"  # one step an epoch
    supervisor.send(make_order(store.add_rows("rows"), n_epochs=5))
    wait_for_log(supervisor, "checkpoint.delayed")
    assert [report.step for report in supervisor.told(StepDone)] == [1, 2, 3]
    assert kept_in(supervisor.scratch_dir, "step-*") == ["step-1", "step-2"]
    supervisor.send(make_order(store.add_rows("others"), lease_token=2, n_epochs=1, batch_size=1))
    supervisor.wait_for(DeviceLeft, 2)
    assert {report.step for report in supervisor.told(StepDone) if report.lease_token == 1} == {1, 2, 3}
    store.held = None
    supervisor.wait_for(JobSucceeded, 1)
    assert [report.step for report in supervisor.told(CheckpointSaved) if report.lease_token == 1] == [1, 2, 3, 4, 5]


def test_a_job_that_is_given_back_before_it_could_store_its_last_checkpoint_ends_elsewhere(
    supervisor: Supervisor, store: Store
) -> None:
    store.held = "/checkpoints/step-1/"
    rows = store.add_rows("rows")
    supervisor.send(make_order(rows, n_epochs=3))
    wait_for_log(supervisor, "checkpoint.delayed")
    supervisor.send(YieldJob(lease_token=1))
    supervisor.wait_for(DeviceLeft)
    store.held = None
    supervisor.wait_for(JobYielded)
    point = supervisor.told(ResumePointSaved)[-1]
    assert point.step == 3
    contents = {file.name: store.objects[f"/{point.artifact}/{file.name}"] for file in point.files}
    stored = {name: store.add(f"point/{name}", content) for name, content in contents.items()}
    broken = {name: break_hash(file) for name, file in stored.items()}
    points = (RemoteResumePoint(step=4, files=broken), RemoteResumePoint(step=3, files=stored))
    fetched: list[str] = []
    store.watch = lambda: fetched.extend(kept_in(supervisor.scratch_dir, "from-step-*"))
    supervisor.send(make_order(rows, lease_token=2, n_epochs=3, resume_points=points))
    supervisor.wait_for(JobSucceeded, 2)
    assert [report.step for report in supervisor.told(CheckpointSaved) if report.lease_token == 2] == [3]
    assert fetched == [], "what a job has gone on from is not kept"


def wait_for_log(supervisor: Supervisor, name: str) -> None:
    """Read reports until the first job has logged this."""
    assert any(isinstance(report, JobLogged) and report.name == name for report in supervisor._read_reports())
