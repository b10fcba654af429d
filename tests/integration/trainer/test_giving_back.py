"""A job that is given back stores its state first, and another worker resumes it there."""

from __future__ import annotations

import pytest

from tests.integration.trainer.object_store import Store, break_hash
from tests.integration.trainer.supervision import SLOTS, HeldStep, Supervisor, kept_in, make_order, wait_for_log
from tests.waiting import wait_until
from worker.engine import CURSOR_FILE, TENSORS_FILE
from worker.messages import (
    CheckpointSaved,
    DeviceLeft,
    JobStarted,
    JobSucceeded,
    JobWarned,
    JobYielded,
    RemoteResumePoint,
    ResumePointSaved,
    StepDone,
    StopJob,
    YieldJob,
)
from worker.trainer.resume import PROGRESS_FILE, RESUME_FILES


def test_a_job_is_given_back_while_all_the_other_slots_prepare(supervisor: Supervisor, store: Store) -> None:
    supervisor.send(make_order(store.add_rows("rows", num_rows=100), n_epochs=50))
    supervisor.wait_for(StepDone)  # a job without a step has nothing to store
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
