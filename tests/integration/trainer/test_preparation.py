"""Jobs that download or wait for a slot can leave at any time, and take no thread or slot from other jobs."""

from __future__ import annotations

import psutil

from tests.integration.trainer.object_store import ENDLESS, Store
from tests.integration.trainer.supervision import SLOTS, Supervisor, make_order
from tests.waiting import wait_until
from worker.engine import CURSOR_FILE, TENSORS_FILE
from worker.messages import (
    DeviceLeft,
    JobFailed,
    JobLogged,
    JobStarted,
    JobSucceeded,
    RemoteFile,
    RemoteResumePoint,
    SlotRefused,
    StopJob,
)
from worker.trainer.resume import PROGRESS_FILE


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
