"""The trainer stores checkpoints and adapters while jobs train, and keeps few files on its scratch disk."""

from __future__ import annotations

import hashlib

import pytest

from tests.integration.trainer.object_store import Store
from tests.integration.trainer.supervision import SLOTS, Supervisor, kept_in, make_order, wait_for_log
from worker.messages import (
    CheckpointSaved,
    DeviceLeft,
    JobSucceeded,
    StepDone,
    StopJob,
)


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
