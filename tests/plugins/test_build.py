"""Building plugins/ on the machine at hand, and the plugins themselves as far as they go without a GPU.

TENSORRT_ROOT: TensorRT's headers, several folders separated by colons. TENSORRT_PYTHON: an interpreter that has
tensorrt_rtx or tensorrt, where this one has neither.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the references are torch code")

from plugin_references import check_score, torch_score  # noqa: E402

from flashvlm_export.selection import SelectionInputs, select  # noqa: E402
from flashvlm_export.testing.references import DEFAULTS, make  # noqa: E402
from gpu_checks.build import ENTRY, PLUGINS  # noqa: E402
from gpu_checks.kernels import poisoned, unpoisoned  # noqa: E402

ROOTS = [root for root in os.environ.get("TENSORRT_ROOT", "").split(os.pathsep) if root]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH: nothing to compile kernels with")
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on PATH")

SCORE = {"eta": 0.5, "temperature": 0.016, "pool_temperature": 1.0, "eps": 1e-6}
LLOYD = {"budget": 9, "top_count": 4, "iterations": 4}
BAD_SCORES = [{name: SCORE[name] for name in SCORE if name != missing} for missing in SCORE] + [
    SCORE | change
    for change in ({"eta": 1.5}, {"eta": math.nan}, {"eta": 1}, {"temperature": 0.0}, {"pool_temperature": -1.0},
                   {"eps": 0.9}, {"eps": 0.0})
]  # fmt: skip
BAD_LLOYDS = [{name: LLOYD[name] for name in LLOYD if name != missing} for missing in LLOYD] + [
    LLOYD | change
    for change in ({"budget": 0}, {"budget": 4097}, {"budget": 9.0}, {"top_count": 10}, {"top_count": -1},
                   {"iterations": 101}, {"iterations": -1})
]  # fmt: skip


# CMake would take TENSORRT_ROOT, a list here, for its own.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TENSORRT_ROOT"}


def run(*command: object, env: dict[str, str] = ENVIRONMENT) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def cmake(build: Path, *options: str, targets: tuple[str, ...] = ()) -> str:
    said = run("cmake", "-S", PLUGINS, "-B", build, *options)
    return said + run("cmake", "--build", build, "-j2", *(f"-t{target}" for target in targets))


@needs_nvcc
@pytest.mark.parametrize(
    "architecture", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 86, 87, 89, 100, 110, 120))]
)
def test_kernels_compile_without_warnings_or_spills(architecture, tmp_path):
    """Registers that spill into memory would not show in results, only in time."""
    if f"sm_{architecture}\n" not in run("nvcc", "--list-gpu-code"):
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    said = run("nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas=-v", "-Werror=all-warnings",
               "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror", "-c", ENTRY, "-o", tmp_path / "entry.o")  # fmt: skip
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(frames) == 12  # ScoreTiles and GramTilesAndRanks of three types, and six more kernels
    assert set(frames) == {("0", "0", "0")}
    shared = [int(size) for size in re.findall(r"(\d+) bytes smem", said)]
    assert max(shared) <= 48 * 1024  # what every GPU has without asking


@needs_nvcc
@needs_cmake
@pytest.mark.slow
def test_every_architecture_builds_and_missing_headers_are_said(tmp_path):
    said = cmake(tmp_path, "-DTENSORRT_ROOT=")
    for architecture in (80, 86, 87, 89, 90, 100, 110, 120):
        assert str(architecture) in said
    assert "libflashvlm_plugins.so is NOT built" in said
    kernels = ctypes.CDLL(str(tmp_path / "libflashvlm_kernels.so"))  # needs no driver until it launches
    kernels.flashvlm_score_workspace.restype = ctypes.c_size_t
    assert kernels.flashvlm_score_workspace(1, 576, 64, 4096) > 0
    assert not (tmp_path / "libflashvlm_plugins.so").exists()


@needs_cmake
def test_without_nvcc_the_emulation_is_built(tmp_path):
    path = os.pathsep.join(p for p in ENVIRONMENT["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())
    if shutil.which("cmake", path=path) is None or shutil.which("g++", path=path) is None:
        pytest.skip("nvcc shares its folder with cmake or g++ and cannot be hidden")
    hidden = {k: v for k, v in ENVIRONMENT.items() if k not in ("CUDACXX", "CUDA_PATH", "CUDA_HOME")} | {"PATH": path}
    said = run("cmake", "-S", PLUGINS, "-B", tmp_path, env=hidden)
    if "No nvcc found" not in said:
        pytest.skip("cmake finds a CUDA toolkit outside PATH")
    run("cmake", "--build", tmp_path, env=hidden)
    assert (tmp_path / "libflashvlm_kernels_host.so").exists()


@needs_cmake
@needs_nvcc
def test_a_wrong_tensorrt_root_is_refused(tmp_path):
    done = subprocess.run(
        ["cmake", "-S", PLUGINS, "-B", tmp_path / "build", f"-DTENSORRT_ROOT={tmp_path}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "expected NvInfer.h" in done.stderr


@pytest.fixture(scope="module", params=ROOTS or [None], ids=lambda root: Path(root).name if root else "no headers")
def plugins(request, tmp_path_factory) -> Path:
    """A folder with the plugins for one architecture and those over the emulation."""
    if request.param is None:
        pytest.skip("TENSORRT_ROOT is not set: no TensorRT headers to compile with")
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("no nvcc or no cmake on PATH")
    build = tmp_path_factory.mktemp("plugins")
    options = ("-DCMAKE_CUDA_ARCHITECTURES=90", "-DFLASHVLM_TESTS=ON", "-DCMAKE_CXX_FLAGS=-Werror")
    cmake(build, f"-DTENSORRT_ROOT={request.param}", *options)
    return build


def tensorrt_python() -> tuple[str, str] | None:
    """An interpreter and the TensorRT module that it has."""
    for python in (os.environ.get("TENSORRT_PYTHON"), sys.executable):
        for module in ("tensorrt_rtx", "tensorrt"):
            if python and not subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
                return python, module
    return None


def test_the_registry_takes_the_plugins(plugins):
    """A real TensorRT loads the library; its creators take good attributes and refuse bad ones in one line each."""
    found = tensorrt_python()
    if found is None:
        pytest.skip("neither tensorrt_rtx nor tensorrt is installed, nor named by TENSORRT_PYTHON")
    tries = {"TextGuidedScore": [SCORE, *BAD_SCORES], "MaskedLloyd": [LLOYD, *BAD_LLOYDS]}
    script = Path(__file__).with_name("registry_check.py")
    done = subprocess.run(
        [found[0], script, found[1], plugins / "libflashvlm_plugins.so"],
        input=json.dumps(tries), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["TextGuidedScore"] == {"fields": list(SCORE), "results": [True] + [False] * len(BAD_SCORES)}
    assert answer["MaskedLloyd"] == {"fields": list(LLOYD), "results": [True] + [False] * len(BAD_LLOYDS)}
    refusals = [line for line in done.stderr.splitlines() if "attribute" in line]
    assert len(refusals) == len(BAD_SCORES) + len(BAD_LLOYDS)


# ---- the plugins over the emulated kernels, driven as TensorRT drives them ----------------------------------------

TYPES = {torch.float32: 0, torch.float16: 1, torch.int32: 3, torch.bool: 4, torch.bfloat16: 7}
STEPS = ("done", "find", "create", "identity", "types", "configure", "serialise", "shapes", "run", "overrun")


class Field(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("type", ctypes.c_int32),
                ("length", ctypes.c_int32))  # fmt: skip


class Tensor(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("rank", ctypes.c_int32), ("dims", ctypes.c_int64 * 4),
                ("data", ctypes.c_void_p))  # fmt: skip


class Driver:
    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        self.c.driver_log.restype = ctypes.c_char_p

    def log(self) -> str:
        return self.c.driver_log().decode()

    def __call__(self, name: str, attributes: dict, *tensors: torch.Tensor, outputs: int = 1) -> str:
        """The step that refused, or done."""
        kinds = {float: (1, ctypes.c_float), int: (10, ctypes.c_int64)}  # FLOAT32, and INT64 as ONNX has integers
        values = [kinds[type(value)][1](value) for value in attributes.values()]
        fields = (Field * len(attributes))(
            *(
                Field(key.encode(), ctypes.addressof(held), kinds[type(value)][0], 1)
                for (key, value), held in zip(attributes.items(), values, strict=True)
            )
        )
        described = (Tensor * len(tensors))(
            *(Tensor(TYPES[t.dtype], t.dim(), (ctypes.c_int64 * 4)(*t.shape), t.data_ptr()) for t in tensors)
        )
        inputs = len(tensors) - outputs
        return STEPS[self.c.drive(name.encode(), fields, len(fields), described, inputs, outputs)]

    def score(self, x: SelectionInputs, params=DEFAULTS, mask=torch.bool) -> torch.Tensor:
        raw = poisoned(x.valid.numel(), torch.float32)
        view = raw[: x.valid.numel()].view(x.valid.shape)
        inputs = [x.projected, x.query, x.query_mask.to(mask), x.saliency.float(), x.valid.to(mask)]
        step = self("TextGuidedScore", {name: getattr(params, name) for name in SCORE}, *inputs, view)
        assert step == "done", self.log()
        return unpoisoned(raw, tuple(x.valid.shape))


@pytest.fixture
def drive(plugins) -> Driver:
    return Driver(plugins / "libflashvlm_plugins_host.so")


@pytest.mark.parametrize("mask", [torch.bool, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_plugins_run(drive, dtype, mask):
    x = make(B=2, N=45, D=40, Dv=24, L=6, masks=True, dtype=dtype)

    class Plugin:
        launches = 3

        def score(self, inputs, params):
            return drive.score(inputs, params, mask)

    check_score(Plugin(), x)
    wanted = select(*x, budget=9)
    raw = [poisoned(18, torch.int32) for _ in range(2)]
    views = [r[:18].view(2, 9) for r in raw]
    inputs = (x.features, torch_score(x, DEFAULTS), x.valid.to(mask))
    assert drive("MaskedLloyd", LLOYD, *inputs, *views, outputs=2) == "done", drive.log()
    kept, is_top = (unpoisoned(r, (2, 9)) for r in raw)
    assert torch.equal(kept.long(), wanted.kept)
    assert torch.equal(is_top.bool(), wanted.is_top)


def test_plugins_refuse_in_one_line(drive):
    x = make(B=2, N=12)
    scores = torch.zeros(2, 12)
    masks = (x.query_mask, x.saliency, x.valid)

    def refused(step: str, said: str, *call, **options) -> None:
        assert drive(*call, **options) == step
        lines = drive.log().splitlines()
        assert len(lines) == (1 if said else 0)
        assert said in "".join(lines)

    refused("create", "attribute eps: missing", "TextGuidedScore", {k: SCORE[k] for k in list(SCORE)[:3]})
    narrow = (x.projected[..., :20].contiguous(), x.query[..., :20].contiguous())
    refused("configure", "D: expected a multiple of 8, found 20", "TextGuidedScore", SCORE, *narrow, *masks, scores)
    many = (torch.zeros(1, 4097, 8), torch.zeros(1, 5, 8), torch.ones(1, 5).bool())
    many += (torch.zeros(1, 4097), torch.ones(1, 4097).bool(), torch.zeros(1, 4097))
    refused("configure", "N: expected 1 to 4096, found 4097", "TextGuidedScore", SCORE, *many)
    wrong = (x.projected, x.query[:1], *masks, scores)
    refused("configure", "input 1: expected B = 2", "TextGuidedScore", SCORE, *wrong)
    flat = (x.projected[0], x.query, *masks, scores)
    refused("configure", "input 0: expected dimensions BND", "TextGuidedScore", SCORE, *flat)
    mixed = (x.projected, x.query.half(), *masks, scores)
    refused("types", "", "TextGuidedScore", SCORE, *mixed)
    kept = [torch.zeros(2, 13, dtype=torch.int32) for _ in range(2)]
    call = ("MaskedLloyd", LLOYD | {"budget": 13}, x.features, scores, x.valid, *kept)
    refused("configure", "N: expected 13 to 4096, found 12", *call, outputs=2)
    call = ("MaskedLloyd", LLOYD, x.features, scores, x.valid, kept[0], kept[1].bool())
    refused("types", "", *call, outputs=2)
