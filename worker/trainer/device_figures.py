"""Figures of the device's work, for the operator. The loop gathers them and reports them once a second.

Peaks are the makers' figures for dense bfloat16, found by a part of the device's name. For a device that is not listed,
such as a CPU, the peak is unknown and the utilization is not shown.
"""

from __future__ import annotations

import psutil
import torch

from worker.messages import DeviceFigures

_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}
_UNLIKE = {"L4": ("L40",), "A10": ("A100", "A10G")}  # other devices whose names contain this one


class DeviceMeter:
    """Gathers the steps since the last report. Training one token costs the base's products `flops_per_token`."""

    def __init__(self, device: torch.device, *, flops_per_token: float) -> None:
        self._device, self._flops_per_token = device, flops_per_token
        self._name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._process = psutil.Process()
        self._step_seconds: list[float] = []
        self._flops = 0.0

    def note_step(self, *, seconds: float, cost_tokens: float) -> None:
        self._step_seconds.append(seconds)
        self._flops += cost_tokens * self._flops_per_token

    def take(self, *, num_preparing: int, num_waiting: int) -> DeviceFigures:
        """Return the figures since the last call."""
        used_bytes, total_bytes = self._measure_memory()
        taken = DeviceFigures(
            device=self._name,
            step_seconds=tuple(self._step_seconds),
            flops=self._flops,
            peak_flops=find_peak_flops(self._name),
            memory_used_bytes=used_bytes,
            memory_total_bytes=total_bytes,
            num_preparing=num_preparing,
            num_waiting=num_waiting,
        )
        self._step_seconds, self._flops = [], 0.0
        return taken

    def _measure_memory(self) -> tuple[int, int]:
        """Return the memory in use and the total: of a GPU by all processes, of a machine by this process."""
        if self._device.type == "cuda":
            free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
            return total_bytes - free_bytes, total_bytes
        return self._process.memory_info().rss, psutil.virtual_memory().total


def find_peak_flops(device_name: str) -> float | None:
    """Return the device's peak in FLOP/s, or None where it is not known."""
    for part, flops in _PEAK_FLOPS.items():
        if part in device_name and not any(other in device_name for other in _UNLIKE.get(part, ())):
            return flops
    return None
