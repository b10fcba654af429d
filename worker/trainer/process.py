"""The trainer process: loads the base once, then admits and evicts jobs at step boundaries as long as it lives."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers.utils import logging as transformers_logging

from core.domain.datasets.tokenizers import tokenizer_path
from core.sandbox import leave_root
from core.scratch import scratch_directory
from worker.engine import Engine
from worker.messages import OUT_OF_MEMORY_EXIT_CODE, BaseInspected, BaseLoaded, BaseRefused, LoadBase, LoadWeights
from worker.trainer.bases import load_base
from worker.trainer.blame import blaming, blaming_the_worker
from worker.trainer.channel import Channel, take_pipes
from worker.trainer.failures import BaseRefusedError, WorkerUnfitError
from worker.trainer.inspection import inspect_files
from worker.trainer.loop import TrainingLoop
from worker.trainer.tokenizers import describe_tokenizer, write_bundle
from worker.trainer.transfers import trust

log = structlog.get_logger()


def main(*, are_secrets_hidden: bool) -> None:
    if not are_secrets_hidden:
        log.warning("trainer.secrets_readable")
    _quiet_libraries()
    trust()
    if threads := os.environ.get("ESPALIER_TRAINER_THREADS"):
        torch.set_num_threads(int(threads))
    channel = Channel(*take_pipes())
    order = channel.receive(wait_seconds=None)
    assert isinstance(order, LoadBase)
    try:
        with contextlib.ExitStack() as exits:
            if loop := _prepare(channel, order, exits):
                loop.run()
    except MemoryError:
        log.exception("memory.exhausted")
        os._exit(OUT_OF_MEMORY_EXIT_CODE)
    except RuntimeError as error:  # torch's message when the host's allocator fails
        if "allocate memory" not in str(error):
            raise
        log.exception("memory.exhausted")
        os._exit(OUT_OF_MEMORY_EXIT_CODE)


def _quiet_libraries() -> None:
    """Stop transformers' progress bars, and send its log to the process's log instead of a stream of its own."""
    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()


def _prepare(channel: Channel, order: LoadBase, exits: contextlib.ExitStack) -> TrainingLoop | None:
    """Return a loop on the base, once it is wanted. If it cannot be loaded, report that and return None."""
    try:
        with blaming_the_worker():
            scratch_dir = exits.enter_context(scratch_directory("trainer", scratch_parent()))
        channel.send(BaseInspected(tokenizer_path=str(_keep_tokenizer(order, inspect_files(order)))))
        wanted = channel.receive(wait_seconds=None)
        assert isinstance(wanted, LoadWeights)
        base = load_base(order)
        with blaming():
            engine = Engine(
                base.model,
                base_model_id=order.base_model_id,
                max_slots=order.slots,
                max_rank=order.max_rank,
                max_tokens_per_step=order.max_tokens_per_step,
            )
    except (BaseRefusedError, WorkerUnfitError) as error:
        channel.send(BaseRefused(message=str(error), is_worker_fault=isinstance(error, WorkerUnfitError)))
        return None
    leave_root(scratch_dir)
    log.info("trainer.confined", user_id=os.geteuid())
    log.info("base_model.loaded", base_model=order.base_model_id, seconds=round(base.seconds, 2), pid=os.getpid())
    channel.send(BaseLoaded(seconds=base.seconds))
    return TrainingLoop(channel, engine, base, order, scratch_dir=scratch_dir)


def scratch_parent() -> Path:
    """Return the system's temporary directory, or the one in the environment even if it cannot be used."""
    return Path(os.environ.get("TMPDIR") or tempfile.gettempdir())


def _keep_tokenizer(order: LoadBase, tokenizer: Any) -> Path:
    path = tokenizer_path(Path(order.cache_dir), order.base_model_id)
    with blaming_the_worker():
        write_bundle(describe_tokenizer(tokenizer), path)
    return path
