"""Decides whether the base or this worker is at fault when a base cannot be loaded, in words for its operator.

| what fails | at fault |
|---|---|
| memory: `MemoryError`, the device's, `ENOMEM`, or an error whose text says so | this worker |
| a missing package, or the device itself | this worker |
| the disk or the number of open files (`_WORKER_ERRNOS`) | this worker |
| a base that cannot be fused | the base |
| any other error, also an unforeseen one | the base |

A fault of the base stops every worker. A fault of this worker leaves the base to others.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import structlog
import torch
from safetensors import SafetensorError

from worker.engine import UnsupportedBaseError
from worker.trainer.failures import BaseRefusedError, TrainerError, WorkerUnfitError

log = structlog.get_logger()
_WORKER_ERRNOS = frozenset(
    {errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}
)
_MEMORY_WORDS = ("allocate memory", "out of memory")
# The errors of transformers, safetensors and torch for files and settings that do not match.
_LOADING_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    MemoryError,
    SafetensorError,
)


@contextlib.contextmanager
def blaming() -> Iterator[None]:
    """Raise BaseRefusedError or WorkerUnfitError for any error with a base in this block."""
    try:
        yield
    except UnsupportedBaseError as error:
        raise BaseRefusedError(str(error)) from error
    except _LOADING_ERRORS as error:
        log.exception("base_model.unloadable")
        raise _blame(error) from error


@contextlib.contextmanager
def blaming_the_worker() -> Iterator[None]:
    """Raise WorkerUnfitError if the operating system refuses something in this block."""
    try:
        yield
    except OSError as error:
        raise WorkerUnfitError(_describe(error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | OSError | SafetensorError) and any(
        words in str(error).lower() for words in _MEMORY_WORDS
    )


def _blame(error: Exception) -> TrainerError:
    if is_out_of_memory(error):
        return WorkerUnfitError(f"It has too little memory for the base: {_describe(error)}")
    is_worker_fault = isinstance(error, ImportError | torch.AcceleratorError) or (
        isinstance(error, OSError) and error.errno in _WORKER_ERRNOS
    )
    return WorkerUnfitError(_describe(error)) if is_worker_fault else BaseRefusedError(_describe(error))


def _describe(error: Exception) -> str:
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0][:500]}" if words else type(error).__name__
