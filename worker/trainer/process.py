"""The trainer process: load the base once, then take jobs in and out at step boundaries for as long as it lives."""

from __future__ import annotations

import os
from pathlib import Path

import structlog
import torch

from core.domain.datasets.tokenizers import tokenizer_path
from core.sandbox import leave_root
from core.telemetry import configure_logs
from worker.engine import Engine
from worker.messages import OUT_OF_MEMORY_EXIT_CODE, BaseLoaded, BaseRefused, LoadBase
from worker.scratch import scratch_directory
from worker.trainer.bases import load_base
from worker.trainer.channel import Channel, take_pipes
from worker.trainer.failures import BaseRefusedError
from worker.trainer.loop import TrainingLoop
from worker.trainer.tokenizers import write_bundle

log = structlog.get_logger()


def main() -> None:
    configure_logs("trainer")
    if threads := os.environ.get("ESPALIER_TRAINER_THREADS"):
        torch.set_num_threads(int(threads))
    channel = Channel(*take_pipes())
    order = channel.receive(wait_seconds=None)
    assert isinstance(order, LoadBase)
    try:
        base = load_base(order)
    except BaseRefusedError as error:
        channel.send(BaseRefused(message=str(error)))
        return
    engine = Engine(
        base.model,
        base_model_id=order.base_model_id,
        max_slots=order.slots,
        max_rank=order.max_rank,
        max_tokens_per_step=order.max_tokens_per_step,
    )
    log.info("base_model.loaded", base_model=order.base_model_id, seconds=round(base.seconds, 2), pid=os.getpid())
    bundle_path = tokenizer_path(Path(order.cache_dir), order.base_model_id)
    write_bundle(base.bundle, bundle_path)
    channel.send(BaseLoaded(seconds=base.seconds, tokenizer_path=str(bundle_path)))
    try:
        with scratch_directory() as scratch_dir:
            leave_root(scratch_dir)
            log.info("trainer.confined", user_id=os.geteuid())
            TrainingLoop(channel, engine, base, order, scratch_dir=scratch_dir).run()
    except MemoryError:
        log.exception("memory.exhausted")
        os._exit(OUT_OF_MEMORY_EXIT_CODE)
    except RuntimeError as error:  # what torch raises when the host's allocator fails
        if "allocate memory" not in str(error):
            raise
        log.exception("memory.exhausted")
        os._exit(OUT_OF_MEMORY_EXIT_CODE)
