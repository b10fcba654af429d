"""Checks the GPUs of this host, their driver, and whether the installed torch can use them, without loading torch."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

from cli.doctor.findings import Finding, failed, ok, skipped

_QUERY = "--query-gpu=name,driver_version,memory.total,memory.used"
_SECONDS = 20
# The torch that is installed is built with CUDA 13, which needs at least this driver.
_OLDEST_DRIVER = 580


def check_devices() -> Finding:
    """Ask nvidia-smi, if it is installed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return skipped("gpu", "This host has no NVIDIA driver.")
    try:
        argv = (tool, _QUERY, "--format=csv,noheader,nounits")
        told = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=_SECONDS).stdout
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "Run nvidia-smi by hand; the driver and its library may be of different versions until a restart."
        return failed("gpu", f"nvidia-smi does not answer: {type(error).__name__}.", remedy=remedy)
    gpus = [[part.strip() for part in line.split(",")] for line in told.splitlines() if line.strip()]
    if not gpus:
        return failed("gpu", "The driver is there, and no GPU.", remedy="See that the GPU is passed to this host.")
    return _judge(gpus)


def _judge(gpus: list[list[str]]) -> Finding:
    names = ", ".join(f"{name} ({int(used)} of {int(total)} MiB used)" for name, _driver, total, used in gpus)
    driver = gpus[0][1]
    says = f"{names}; driver {driver}."
    if int(driver.partition(".")[0]) < _OLDEST_DRIVER:
        return failed("gpu", says, remedy=f"Install driver {_OLDEST_DRIVER} or newer: CUDA 13 needs it.")
    try:
        torch = version("torch")
    except PackageNotFoundError:
        return ok("gpu", f"{says} torch is not installed here, so this is no worker.")
    if torch.endswith("+cpu"):
        return failed("gpu", f"{says} torch {torch} cannot use it.", remedy="Install torch's CUDA build.")
    return ok("gpu", f"{says} torch {torch} is built for CUDA.")
