"""Faults of a base are found before its weights are read, and assigned to the base or to the worker."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from core.domain.bases import LINEARS_BY_MODEL_TYPE
from core.scratch import scratch_directory
from local.binaries import find_smollm2
from tests.factories.tiny_bases import write_tiny_base
from worker.engine import UnsupportedBaseError, inspect_base
from worker.messages import LoadBase
from worker.trainer.bases import load_base
from worker.trainer.blame import blaming, blaming_the_worker
from worker.trainer.failures import BaseRefusedError, WorkerUnfitError
from worker.trainer.inspection import inspect_files
from worker.trainer.process import scratch_parent

NOBODY = 65534
LLAMA = LINEARS_BY_MODEL_TYPE["llama"]


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base_dir(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def make_order(location: Path, **changes: Any) -> LoadBase:
    order = LoadBase(
        base_model_id="acme/tiny",
        source_kind="path",
        location=str(location),
        revision="",
        dtype="float32",
        quantization=None,
        target_modules=LLAMA,
        chat_template=None,
        slots=2,
        max_rank=8,
        max_tokens_per_step=64,
        cache_dir=str(location.parent / "cache"),
        resume_steps=10,
        resume_seconds=10,
        storage_patience_seconds=1,
    )
    return order.model_copy(update=changes)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_index(directory: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_short(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def take_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))


def take_end_of_turn(directory: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)


def test_a_base_that_is_well_is_inspected_without_a_weight_and_loaded(base_dir: Path) -> None:
    tokenizer = inspect_files(make_order(base_dir))
    assert tokenizer.chat_template
    assert load_base(make_order(base_dir)).model.config.model_type == "llama"


def test_a_gguf_file_is_inspected_without_being_converted(tmp_path: Path) -> None:
    gguf = find_smollm2()
    order = make_order(gguf, source_kind="gguf", cache_dir=str(tmp_path))
    assert inspect_files(order).chat_template
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (shutil.rmtree, "There is no base model at"),
        (lambda base: (base / "config.json").unlink(), "config.json"),
        (lambda base: (base / "config.json").write_text("{"), "JSON"),
        (lambda base: change_config(base, model_type="gpt2"), "Models of type 'gpt2' cannot be fused"),
        (lambda base: change_config(base, model_type="no-such-model"), "no-such-model"),
        (lambda base: change_config(base, auto_map={"AutoModel": "x.py"}), "code of its own"),
        (lambda base: (base / "model.safetensors").unlink(), "no safetensors files"),
        (add_index, "model-00002.safetensors"),
        (cut_short, "SafetensorError"),
        (take_template, "no chat template"),
        (take_end_of_turn, "no control token after an answer but '', so that a model would not learn when to stop"),
        (lambda base: (base / "tokenizer.json").unlink(), "okenizer"),
    ],
)
def test_what_is_wrong_with_a_bases_files_is_the_bases_fault_and_named(
    base_dir: Path, spoil: Callable[[Path], Any], reason: str
) -> None:
    spoil(base_dir)
    with pytest.raises(BaseRefusedError, match=reason):
        inspect_files(make_order(base_dir))


def test_files_that_a_workers_user_may_not_read_are_named_as_such(tiny_base: Path) -> None:
    with tempfile.TemporaryDirectory() as parent:  # pytest's own is closed to everybody else
        base = Path(shutil.copytree(tiny_base, Path(parent) / "base"))
        Path(parent).chmod(0o755)
        base.chmod(0o755)
        for file in base.iterdir():
            file.chmod(0o644)
        (base / "model.safetensors").chmod(0)
        order = make_order(base)
        with as_nobody(), pytest.raises(BaseRefusedError, match=r"Permission denied: .*model\.safetensors"):
            inspect_files(order)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Be a user who may read what everybody may: root reads everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


def test_targets_that_a_base_lacks_are_named_with_those_it_has(base_dir: Path) -> None:
    with pytest.raises(BaseRefusedError, match=r"target_modules c_attn, which acme/tiny lacks; it has down_proj"):
        inspect_files(make_order(base_dir, target_modules=("q_proj", "c_attn")))


def test_a_hubs_repository_needs_a_revision_and_one_that_is_not_there_is_the_bases_fault(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = make_order(base_dir).model_copy(update={"source_kind": "hub", "location": "acme/none"})
    with pytest.raises(BaseRefusedError, match="pin its revision"):
        inspect_files(order)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseRefusedError):
        inspect_files(order.model_copy(update={"revision": "0" * 40}))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/models/model.safetensors"), BaseRefusedError),
        (FileNotFoundError(errno.ENOENT, "No such file", "/models/model.safetensors"), BaseRefusedError),
        (ValueError("The checkpoint is of another type."), BaseRefusedError),
        (UnsupportedBaseError("It cannot be fused."), BaseRefusedError),
        (RuntimeError("Error(s) in loading state_dict: size mismatch"), BaseRefusedError),
        (MemoryError(), WorkerUnfitError),
        (torch.OutOfMemoryError("CUDA out of memory."), WorkerUnfitError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), WorkerUnfitError),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), WorkerUnfitError),
        (OSError(errno.ENOSPC, "No space left on device"), WorkerUnfitError),
        (ImportError("bitsandbytes is not installed"), WorkerUnfitError),
    ],
)
def test_a_base_is_blamed_for_its_files_and_a_worker_for_what_it_lacks(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as blamed, blaming():
        raise error
    assert str(blamed.value)


def test_a_worker_without_a_place_for_its_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    with (
        pytest.raises(WorkerUnfitError, match="nowhere"),
        blaming_the_worker(),
        scratch_directory("trainer", scratch_parent()),
    ):
        pass


@pytest.mark.parametrize("model_type", sorted(LINEARS_BY_MODEL_TYPE))
def test_the_linears_that_are_registered_by_default_are_those_that_a_model_of_the_type_has(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        shape = inspect_base(AutoModelForCausalLM.from_config(config))
    assert set(shape.target_modules) == set(LINEARS_BY_MODEL_TYPE[model_type])


@pytest.mark.parametrize("model_type", sorted(LINEARS_BY_MODEL_TYPE))
def test_siblings_are_neighbours_in_a_model_as_the_reader_of_older_states_expects(model_type: str) -> None:
    with torch.device("meta"):
        shape = inspect_base(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, num_hidden_layers=2)))
    assert [name for siblings in shape.siblings for name in siblings] == list(shape.linears)
