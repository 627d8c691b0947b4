"""The kernels of plugins/kernels through ctypes, on torch tensors: the host emulation, or the real ones on a GPU.

Every checked call runs in a poisoned workspace and into poisoned outputs, with guards behind each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashvlm_export.selection import SelectionInputs, SelectionParams

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


class KernelError(AssertionError):
    """The kernels refused a good call, or wrote where they should not, or not where they should."""


class Prepared(NamedTuple):
    """A call whose memory stands ready: ``launch`` queues it on torch's current stream, as often as wanted."""

    launch: Callable[[], None]
    outputs: list[Tensor]  # poisoned, with a guard behind; unpoisoned() reads them
    workspace: Tensor
    keep: list[Any]  # inputs that the call points to


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

    def score(self, inputs: SelectionInputs, params: SelectionParams, mask_dtype: torch.dtype = torch.bool) -> Tensor:
        """Scores [B, N] of the kernels."""
        (scores,) = self._checked(self.prepare_score(inputs, params, mask_dtype))
        return unpoisoned(scores, tuple(inputs.valid.shape))

    def lloyd(
        self,
        features: Tensor,
        scores: Tensor,
        valid: Tensor,
        budget: int,
        top_count: int,
        iterations: int = 4,
        mask_dtype: torch.dtype = torch.bool,
    ) -> tuple[Tensor, Tensor]:
        """kept [B, K] and is_top [B, K] of the kernels."""
        prepared = self.prepare_lloyd(features, scores, valid, budget, top_count, iterations, mask_dtype)
        kept, is_top = (unpoisoned(raw, (features.shape[0], budget)) for raw in self._checked(prepared))
        if not ((is_top == 0) | (is_top == 1)).all():
            raise KernelError("is_top holds values other than 0 and 1")
        return kept, is_top.bool()

    def prepare_score(
        self, inputs: SelectionInputs, params: SelectionParams, mask_dtype: torch.dtype = torch.bool
    ) -> Prepared:
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
        size = self.c.flashvlm_score_workspace(B, N, L, D)
        return self._prepared(self.c.flashvlm_score, call, size, [scores], [*masks, *tensors])

    def prepare_lloyd(
        self,
        features: Tensor,
        scores: Tensor,
        valid: Tensor,
        budget: int,
        top_count: int,
        iterations: int = 4,
        mask_dtype: torch.dtype = torch.bool,
    ) -> Prepared:
        features, scores, valid = (tensor.to(self.device) for tensor in (features, scores, valid))
        B, N, Dv = features.shape
        features, scores, valid = features.contiguous(), scores.float().contiguous(), valid.to(mask_dtype).contiguous()
        kept, is_top = (poisoned(B * budget, torch.int32, self.device) for _ in range(2))
        call = LloydCall(
            batch=B, tokens=N, width=Dv, dtype=DTYPES[features.dtype], mask_bytes=valid.itemsize,
            budget=budget, top_count=top_count, iterations=iterations, features=features.data_ptr(),
            scores=scores.data_ptr(), valid=valid.data_ptr(), kept=kept.data_ptr(), is_top=is_top.data_ptr(),
        )  # fmt: skip
        size = self.c.flashvlm_lloyd_workspace(B, N, Dv, budget, top_count)
        return self._prepared(self.c.flashvlm_lloyd, call, size, [kept, is_top], [features, scores, valid])

    def _prepared(self, function: Any, call: Any, size: int, outputs: list[Tensor], keep: list[Any]) -> Prepared:
        if size <= 0 or size % 4 != 0:
            raise KernelError(f"the workspace function gave {size} bytes for good sizes")
        workspace = poisoned(size // 4, torch.float32, self.device)

        def launch() -> None:
            stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else None
            status = function(ctypes.byref(call), workspace.data_ptr(), size, stream)
            if status != 0:
                raise KernelError(self.text(status))

        return Prepared(launch, outputs, workspace, [call, *keep])

    def _checked(self, prepared: Prepared) -> list[Tensor]:
        prepared.launch()
        if self.device.type == "cpu":
            self.launches = self.c.flashvlm_emulation_launches()
        if not (prepared.workspace.view(torch.int32)[-GUARD:] == -1).all():
            raise KernelError("wrote behind the workspace")
        return prepared.outputs


def poisoned(count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """NaN as float, -1 as integer, and a guard of the same behind."""
    return torch.full((count + GUARD,), -1, dtype=torch.int32, device=device).view(dtype)


def unpoisoned(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    bits = tensor.view(torch.int32)
    if not (bits[-GUARD:] == -1).all():
        raise KernelError("wrote behind an output")
    if (bits[:-GUARD] == -1).any():
        raise KernelError("left a part of an output unwritten")
    return tensor[:-GUARD].view(shape).cpu()
