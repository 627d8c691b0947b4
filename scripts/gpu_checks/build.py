"""A library of the kernels for the GPU at hand, or of their host emulation."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from .record import Job, Record, Skip

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
ENTRY = PLUGINS / "kernels" / "entry.cu"
OLDEST = 8.0  # mma.m16n8k16 of float16 and bfloat16


class BuildError(Exception):
    """The compiler refused; its last lines."""


def run(job: Job, record: Record) -> None:
    started = time.perf_counter()
    if job.library is not None:
        if not job.library.is_file():
            raise Skip(f"--library {job.library}: no such file", "cmake -S plugins -B build && cmake --build build")
        library = job.library.resolve()
    elif job.device == "emulation":
        if shutil.which("g++") is None:
            raise Skip("no g++ on PATH", "install a C++17 compiler, such as the package g++")
        library = build_emulation(job.work)
    else:
        capability = job.facts["gpu"]["compute_capability"]
        if float(capability) < OLDEST:
            raise Skip(f"compute capability {capability}: the kernels need {OLDEST} (Ampere) or newer")
        if shutil.which("nvcc") is None:
            raise Skip("no nvcc on PATH", "put the CUDA toolkit's bin on PATH, or give --library")
        library = build_for_gpu(job.work, capability)
    record.fact("library", str(library))
    record.fact("build_seconds", round(time.perf_counter() - started, 1))


def build_emulation(folder: Path, *flags: str) -> Path:
    folder.mkdir(exist_ok=True)
    library = folder / "libflashvlm_kernels_host.so"
    command = ["g++", "-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden"]
    _compile([*command, *flags, "-x", "c++", str(ENTRY), "-o", str(library)])
    return library


def build_for_gpu(folder: Path, capability: str) -> Path:
    """capability: such as 9.0. With line numbers, which cost nothing, for what compute-sanitizer finds."""
    library = folder / "libflashvlm_kernels.so"
    architecture = f"-arch=sm_{capability.replace('.', '')}"
    command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", architecture, "-Xcompiler=-fPIC", "-shared"]
    _compile([*command, str(ENTRY), "-o", str(library)])
    return library


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise BuildError("\n".join([f"{command[0]} failed:", *said[-8:]]))
