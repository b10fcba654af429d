"""The whole service with real processes: a tiny random base, real jobs, and a worker killed during training."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import BadRequestError, OpenAI
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from local.stack import LocalStack
from tests.e2e.lab import BASE_MODEL, ENDED
from tests.public_rows import PUBLIC_FILES
from tests.waiting import PATIENCE_SECONDS, wait_until

ROWS = "\n".join(
    json.dumps(
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
    )
    for n in range(12)
).encode()


@pytest.fixture(scope="module")
def api_key(stack: LocalStack) -> str:
    return stack.create_tenant("acme")


@pytest.fixture(scope="module")
def client(stack: LocalStack, api_key: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stack.api_url}/v1", api_key=api_key) as made:
        yield made


def submit(client: OpenAI, *, n_epochs: int = 2, validation: bool = False, **extra: Any) -> str:
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model=BASE_MODEL,
        training_file=file.id,
        validation_file=file.id if validation else None,
        hyperparameters={"n_epochs": n_epochs, "batch_size": 4},
        suffix="test",
        seed=7,
        extra_body={"learning_rate": 0.01, **extra},
    ).id


def wait_for_end(client: OpenAI, job_id: str) -> Any:
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status in ENDED)
    return client.fine_tuning.jobs.retrieve(job_id)


def num_base_loads(stack: LocalStack) -> int:
    return stack.process("worker").log_path.read_text().count('"event": "trainer.started"')


def messages(client: OpenAI, job_id: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


def assert_preview_is_what_is_served(stack: LocalStack, headers: dict[str, str], file_id: str, tiny_base: Path) -> None:
    """The tokenizer that the worker left is the one that transformers loads from the base's directory."""
    url = f"{stack.api_url}/v1/files/{file_id}/preview"
    shown = httpx.post(url, json={"model": BASE_MODEL, "rows": 12}, headers=headers, timeout=PATIENCE_SECONDS).json()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    for row, line in zip(shown["data"], ROWS.splitlines(), strict=True):
        served = tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False)
        assert row["token_ids"] == served
        learnt = tokenizer.decode([i for i, learns in zip(served, row["loss_mask"], strict=True) if learns])
        assert str(learnt).startswith("It is")
    assert shown["statistics"]["is_whole_file"]


def test_a_job_ends_with_an_adapter_that_plain_peft_loads(
    client: OpenAI, stack: LocalStack, api_key: str, tiny_base: Path, tmp_path: Path
) -> None:
    job = wait_for_end(client, submit(client, validation=True))
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model.startswith(f"ft:{BASE_MODEL}:acme:test:")
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [checkpoint.step_number for checkpoint in checkpoints] == [6, 3]
    assert checkpoints[0].metrics.full_valid_loss < checkpoints[1].metrics.full_valid_loss  # type: ignore[operator]
    csv = client.files.content(job.result_files[0]).text.splitlines()
    assert csv[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert len(csv) == 1 + job.model_extra["total_steps"]
    headers = {"authorization": f"Bearer {api_key}"}
    lines = httpx.get(
        f"{stack.api_url}/v1/fine_tuning/jobs/{job.id}/logs", headers=headers, timeout=PATIENCE_SECONDS
    ).json()["data"]
    assert [line["data"]["num_examples"] for line in lines if line["name"] == "dataset.tokenized"] == [12, 12]
    uploaded = [line["data"]["artifact"] for line in lines if line["name"] == "artifact.uploaded"]
    published = {"checkpoints/step-3", "checkpoints/step-6", "adapter", "result"}
    assert {artifact for artifact in uploaded if not artifact.startswith("resume/")} == published
    assert_preview_is_what_is_served(stack, headers, job.training_file, tiny_base)
    adapters = httpx.get(f"{stack.api_url}/v1/adapters", headers=headers, timeout=PATIENCE_SECONDS).json()["data"]
    (adapter,) = (adapter for adapter in adapters if adapter["fine_tuning_job_id"] == job.id)
    url = f"{stack.api_url}/v1/adapters/{adapter['id']}/download"
    archive = httpx.get(url, params={"archive": "tar"}, headers=headers, timeout=PATIENCE_SECONDS).content
    tarfile.open(fileobj=io.BytesIO(archive)).extractall(tmp_path, filter="data")
    for file in httpx.get(url, headers=headers, timeout=PATIENCE_SECONDS).json()["files"]:
        assert httpx.get(file["url"], timeout=PATIENCE_SECONDS).content == (tmp_path / file["name"]).read_bytes()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE_MODEL
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["job_id"], manifest["base_model"]) == (job.id, BASE_MODEL)
    base = LlamaForCausalLM.from_pretrained(tiny_base)
    prompt = torch.tensor([[1, 2, 3]])
    before = base(prompt).logits.detach().clone()
    tuned = PeftModel.from_pretrained(base, str(tmp_path))
    assert not torch.allclose(tuned(prompt).logits, before)


def test_a_second_job_on_a_hot_worker_loads_no_model(client: OpenAI, stack: LocalStack) -> None:
    wait_for_end(client, submit(client))
    num_loads = num_base_loads(stack)
    assert wait_for_end(client, submit(client)).status == "succeeded"
    assert num_base_loads(stack) == num_loads


def test_a_qlora_job_is_trained_on_the_quantised_base(client: OpenAI) -> None:
    job = wait_for_end(client, submit(client, quantization="nf4"))
    assert job.status == "succeeded", job.error


def test_a_job_outlives_its_worker_killed_in_the_middle(client: OpenAI, stack: LocalStack) -> None:
    job_id = submit(client, n_epochs=12)
    wait_until(lambda: any(message.startswith("Step 3/") for message in messages(client, job_id)))
    os.kill(stack.process("worker").pid, signal.SIGKILL)
    wait_until(lambda: stack.restart_dead() == ("worker",))
    job = wait_for_end(client, job_id)
    assert job.status == "succeeded", job.error
    told = messages(client, job_id)
    assert told.count("The job has successfully completed.") == 1
    steps = [row.split(",")[0] for row in client.files.content(job.result_files[0]).text.splitlines()[1:]]
    assert steps == [str(step) for step in range(1, 37)]


def test_a_cancelled_job_frees_its_slot_and_stays_cancelled(client: OpenAI) -> None:
    job_id = submit(client, n_epochs=50)
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "running")
    assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    assert wait_for_end(client, submit(client)).status == "succeeded"
    assert client.fine_tuning.jobs.retrieve(job_id).status == "cancelled"


def test_rows_too_long_are_truncated_and_counted(client: OpenAI) -> None:
    job = wait_for_end(client, submit(client, max_seq_len=35))  # the first label of a one-digit row is its 35th token
    assert job.status == "succeeded", job.error
    told = (
        "12 rows of the training file are longer than max_seq_len=35 tokens and were truncated. "
        "2 rows of the training file had nothing to learn and were dropped."
    )
    assert messages(client, job.id).count(told) == 1
    shown = job.model_extra
    counts = {"num_examples": 10, "num_truncated": 12, "num_dropped": 2, "num_left_out_turns": 0}
    assert shown["datasets"] == {"training": counts, "validation": None}
    assert (shown["progress"], shown["trained_steps"], shown["skipped_steps"]) == (1.0, shown["total_steps"], 0)


def test_a_job_that_truncation_leaves_nothing_to_learn_is_refused_and_says_what_to_change(client: OpenAI) -> None:
    wait_for_end(client, submit(client))  # the base's tokenizer is known from then on
    with pytest.raises(BadRequestError) as refused:
        submit(client, max_seq_len=34)
    assert (refused.value.code, refused.value.param) == ("nothing_to_learn", "training_file")
    assert refused.value.body == {
        "message": "No row of the training file has anything to learn. No answer begins within max_seq_len=34: raise it.",
        "type": "invalid_request_error",
        "param": "training_file",
        "code": "nothing_to_learn",
    }


@pytest.mark.parametrize("module", ["api.main", "schedule.clock", "core.services.attempts"])
def test_the_control_plane_never_loads_torch(module: str) -> None:
    code = (
        f"import sys, {module}; print(sorted({{'torch', 'transformers', 'peft', 'bitsandbytes'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_as_public_tools_write_them_train_as_their_preview_shows(
    stack: LocalStack, client: OpenAI, api_key: str
) -> None:
    wait_for_end(client, submit(client))  # the base's tokenizer is known from then on
    headers = {"authorization": f"Bearer {api_key}"}
    jobs, previews = {}, {}
    for name, content in PUBLIC_FILES.items():
        file = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
        url = f"{stack.api_url}/v1/files/{file.id}/preview"
        previews[name] = httpx.post(url, json={"model": BASE_MODEL}, headers=headers, timeout=PATIENCE_SECONDS).json()
        jobs[name] = client.fine_tuning.jobs.create(
            model=BASE_MODEL, training_file=file.id, hyperparameters={"n_epochs": 1, "batch_size": 1}
        ).id
    for name, job_id in jobs.items():
        ended, statistics = wait_for_end(client, job_id), previews[name]["statistics"]
        assert (ended.status, previews[name]["problems"]) == ("succeeded", []), name
        assert statistics["is_whole_file"], name
        assert ended.trained_tokens == statistics["num_tokens"], name
        assert ended.model_extra["trained_steps"] == statistics["num_rows"], name
