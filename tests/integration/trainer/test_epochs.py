"""The steps of a job, and what it stores and evaluates at the end of each epoch."""

from __future__ import annotations

import hashlib

import pytest

from tests.integration.trainer.object_store import Store
from tests.integration.trainer.supervision import Supervisor, make_order
from worker.messages import (
    CheckpointSaved,
    DatasetsRead,
    EvaluationDone,
    JobFailed,
    JobStarted,
    JobSucceeded,
    JobWarned,
    StepDone,
    StepSkipped,
)


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
