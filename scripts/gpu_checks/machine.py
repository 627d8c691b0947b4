"""The GPU, its driver and what is installed, read without torch: the driver's own library answers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from .record import Job, Record

PACKAGES = (
    "numpy", "torch", "triton", "transformers", "pydantic", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt",
    "tensorrt-rtx",
)  # fmt: skip
# CUdevice_attribute
SM_COUNT, L2_BYTES, MAJOR, MINOR = 16, 38, 75, 76


def run(job: Job, record: Record) -> None:
    gpu = find_gpu() if job.device == "cuda" else None
    record.fact("device", gpu["name"] if gpu else "host emulation of the kernels, no GPU")
    record.fact("gpu", gpu)
    record.fact("processor", f"{_processor()}, {os.cpu_count()} cores")
    record.fact("system", platform.platform())
    record.fact("nvcc", _said(["nvcc", "--version"], r"V(\d+\.\d+\.\d+)"))
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    record.fact("versions", versions)


def find_gpu() -> dict[str, Any] | None:
    """The first GPU that the driver shows; None without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, version, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, 256, device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return {
        "name": name.value.decode(),
        "compute_capability": f"{attribute(MAJOR)}.{attribute(MINOR)}",
        "sm_count": attribute(SM_COUNT),
        "l2_bytes": attribute(L2_BYTES),
        "memory_bytes": memory.value,
        "driver": _driver(),
        "cuda_of_driver": f"{version.value // 1000}.{version.value % 1000 // 10}",
    }


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], r"([\d.]+)")
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found and found[1]


def _said(command: list[str], pattern: str) -> str | None:
    """What a pattern finds in a command's output; None where the command is not there."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    found = re.search(pattern, done.stdout)
    return found and found[1]


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.machine()
