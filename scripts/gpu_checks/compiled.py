"""torch.compile of the selection, beside the kernels. A comparison only: what does not compile fails nothing."""

from __future__ import annotations

import torch

from .correctness import need_torch_cuda
from .names import COMPILED, HOT, LAUNCHES
from .record import Job, Record, Skip
from .speed import hot, inputs, launches, torch_selection


def run(job: Job, record: Record) -> None:
    need_torch_cuda()
    try:
        import triton  # noqa: F401 - what torch.compile generates for a GPU
    except ImportError:
        raise Skip("torch.compile needs triton", "pip install triton") from None
    functions = {}
    for name, dtype, batch, x in inputs(job):
        if batch == 1 and dtype != torch.bfloat16:
            functions[name] = torch.compile(torch_selection("flashvlm", x))
            record.timing(COMPILED, name, batch, LAUNCHES, launches(functions[name], 30))
    try:
        for name, function in functions.items():
            record.timing(COMPILED, name, 1, HOT, hot(function))
    except RuntimeError as error:  # of the capture
        record.skip(f"no CUDA graph of the compiled code ({str(error).splitlines()[0]})")
