"""The kernels of plugins/kernels through ctypes, on torch tensors: the host emulation, or the real ones on a GPU.

Every call runs in a poisoned workspace and into poisoned outputs, with guards behind each.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch

from flashvlm_export.selection import SelectionInputs, SelectionParams

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
ENTRY = PLUGINS / "kernels" / "entry.cu"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
GUARD = 64  # elements behind an output or a workspace that must survive


class ScoreCall(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "tokens", "text", "width", "dtype", "mask_bytes")),
        *((name, ctypes.c_float) for name in ("eta", "temperature", "pool_temperature", "eps")),
        *((name, ctypes.c_void_p) for name in ("projected", "query", "query_mask", "saliency", "valid", "scores")),
    )


class LloydCall(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "tokens", "width", "dtype", "mask_bytes")),
        *((name, ctypes.c_int32) for name in ("budget", "top_count", "iterations")),
        *((name, ctypes.c_void_p) for name in ("features", "scores", "valid", "kept", "is_top")),
    )


def build_emulation(folder: Path, *flags: str) -> Kernels:
    library = folder / "libflashvlm_kernels_host.so"
    command = ["g++", "-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden"]
    subprocess.run([*command, *flags, "-x", "c++", str(ENTRY), "-o", str(library)], check=True)
    return Kernels(library)


def build_for_gpu(folder: Path) -> Kernels:
    """For the GPU of this machine."""
    major, minor = torch.cuda.get_device_capability()
    library = folder / "libflashvlm_kernels.so"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "-Xcompiler=-fPIC", "-shared"]
    subprocess.run([*command, str(ENTRY), "-o", str(library)], check=True)
    return Kernels(library, "cuda")


class Kernels:
    """The C entry points. Takes tensors of any device to that of the kernels and brings the results back."""

    def __init__(self, library: Path, device: str = "cpu") -> None:
        self.c = ctypes.CDLL(str(library))
        self.device = torch.device(device)
        for workspace in (self.c.flashvlm_score_workspace, self.c.flashvlm_lloyd_workspace):
            workspace.restype = ctypes.c_size_t
        for call in (self.c.flashvlm_score, self.c.flashvlm_lloyd):
            call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        self.c.flashvlm_status_text.restype = ctypes.c_char_p
        self.launches: int | None = None  # of the last call; only the emulation counts them

    def order(self, order: int) -> None:
        """Of the threads within a phase: 0 forwards, 1 backwards, 2 shuffled."""
        if self.device.type == "cpu":  # a GPU orders them as it likes
            self.c.flashvlm_emulation_order(order)

    def text(self, status: int) -> str:
        return self.c.flashvlm_status_text(status).decode()

    def score(self, inputs: SelectionInputs, params: SelectionParams, mask_dtype: torch.dtype = torch.bool):
        """Scores [B, N] of the kernels."""
        inputs = SelectionInputs(*(tensor.to(self.device) for tensor in inputs))
        B, N, D = inputs.projected.shape
        L = inputs.query.shape[1]
        masks = [mask.to(mask_dtype).contiguous() for mask in (inputs.query_mask, inputs.valid)]
        tensors = [inputs.projected.contiguous(), inputs.query.contiguous(), inputs.saliency.float().contiguous()]
        scores = poisoned(B * N, torch.float32, self.device)
        call = ScoreCall(
            batch=B, tokens=N, text=L, width=D, dtype=DTYPES[inputs.projected.dtype], mask_bytes=masks[0].itemsize,
            eta=params.eta, temperature=params.temperature, pool_temperature=params.pool_temperature, eps=params.eps,
            projected=tensors[0].data_ptr(), query=tensors[1].data_ptr(), query_mask=masks[0].data_ptr(),
            saliency=tensors[2].data_ptr(), valid=masks[1].data_ptr(), scores=scores.data_ptr(),
        )  # fmt: skip
        self.run(self.c.flashvlm_score, call, self.c.flashvlm_score_workspace(B, N, L, D))
        return unpoisoned(scores, (B, N))

    def lloyd(self, features, scores, valid, budget, top_count, iterations=4, mask_dtype: torch.dtype = torch.bool):
        """kept [B, K] and is_top [B, K] of the kernels."""
        features, scores, valid = (tensor.to(self.device) for tensor in (features, scores, valid))
        B, N, Dv = features.shape
        features, scores, valid = features.contiguous(), scores.float().contiguous(), valid.to(mask_dtype).contiguous()
        kept, is_top = (poisoned(B * budget, torch.int32, self.device) for _ in range(2))
        call = LloydCall(
            batch=B, tokens=N, width=Dv, dtype=DTYPES[features.dtype], mask_bytes=valid.itemsize,
            budget=budget, top_count=top_count, iterations=iterations, features=features.data_ptr(),
            scores=scores.data_ptr(), valid=valid.data_ptr(), kept=kept.data_ptr(), is_top=is_top.data_ptr(),
        )  # fmt: skip
        self.run(self.c.flashvlm_lloyd, call, self.c.flashvlm_lloyd_workspace(B, N, Dv, budget, top_count))
        is_top = unpoisoned(is_top, (B, budget))
        assert ((is_top == 0) | (is_top == 1)).all()
        return unpoisoned(kept, (B, budget)), is_top.bool()

    def run(self, function, call, size: int) -> None:
        assert size > 0, "the workspace function refused the sizes"
        assert size % 4 == 0
        workspace = poisoned(size // 4, torch.float32, self.device)
        stream = None
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream().cuda_stream
        status = function(ctypes.byref(call), workspace.data_ptr(), size, stream)
        assert status == 0, self.text(status)
        if self.device.type == "cpu":
            self.launches = self.c.flashvlm_emulation_launches()
        assert (workspace.view(torch.int32)[-GUARD:] == -1).all(), "wrote behind the workspace"


def poisoned(count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """NaN as float, -1 as integer, and a guard of the same behind."""
    return torch.full((count + GUARD,), -1, dtype=torch.int32, device=device).view(dtype)


def unpoisoned(tensor: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    bits = tensor.view(torch.int32)
    assert (bits[-GUARD:] == -1).all(), "wrote behind an output"
    assert (bits[:-GUARD] != -1).all(), "left a part of an output unwritten"
    return tensor[:-GUARD].view(shape).cpu()
