"""The engine: one frozen base model on one device, many jobs' LoRA adapters trained in one fused step.

It works on tensors and local files only. A caller admits jobs, calls `step` again and again, and evicts jobs. Start
with engine.py, whose `step` reads from top to bottom; docs/adr/ has the reasons for the design.
"""

from worker.engine.bases import BaseShape, inspect_base
from worker.engine.engine import Engine
from worker.engine.errors import (
    DivergedError,
    EngineError,
    InvalidJobError,
    JobTooLargeError,
    NoFreeSlotError,
    UnreadableStateError,
    UnsupportedBaseError,
)
from worker.engine.examples import EngineJob, Evaluation, Example, SlotReport, StepMetrics
from worker.engine.states import CURSOR_FILE, TENSORS_FILE, SlotState, read_cursor

__all__ = [
    "CURSOR_FILE",
    "TENSORS_FILE",
    "BaseShape",
    "DivergedError",
    "Engine",
    "EngineError",
    "EngineJob",
    "Evaluation",
    "Example",
    "InvalidJobError",
    "JobTooLargeError",
    "NoFreeSlotError",
    "SlotReport",
    "SlotState",
    "StepMetrics",
    "UnreadableStateError",
    "UnsupportedBaseError",
    "inspect_base",
    "read_cursor",
]
