"""The dtypes of tensors in graphs and files, and what each library calls them."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir
import torch


class Dtype(NamedTuple):
    """size: bytes of one element."""

    size: int
    torch: torch.dtype
    onnx: ir.DataType
    safetensors: str


DTYPES = {
    "float32": Dtype(4, torch.float32, ir.DataType.FLOAT, "F32"),
    "float16": Dtype(2, torch.float16, ir.DataType.FLOAT16, "F16"),
    "bfloat16": Dtype(2, torch.bfloat16, ir.DataType.BFLOAT16, "BF16"),
    "int64": Dtype(8, torch.int64, ir.DataType.INT64, "I64"),
    "int32": Dtype(4, torch.int32, ir.DataType.INT32, "I32"),
    "int8": Dtype(1, torch.int8, ir.DataType.INT8, "I8"),
    "uint8": Dtype(1, torch.uint8, ir.DataType.UINT8, "U8"),
    "bool": Dtype(1, torch.bool, ir.DataType.BOOL, "BOOL"),
}
# Those that weights of a checkpoint may have, by their name in safetensors.
STORED_FLOATS = {DTYPES[name].safetensors: name for name in ("float32", "float16", "bfloat16")}
