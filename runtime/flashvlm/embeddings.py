"""The token embedding table: memory-mapped, gathered on the host."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from flashvlm.errors import BundleError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def open_table(path: Path, rows: int, width: int) -> np.ndarray:
    """Maps the one tensor of a safetensors file, [rows,width] in its own dtype; rows are read when gathered.

    Raises:
        BundleError: the file holds something else.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            (entry,) = json.loads(file.read(length)).values()
            if entry["shape"] != [rows, width]:
                raise ValueError
            return np.memmap(path, DTYPES[entry["dtype"]], mode="r", offset=8 + length, shape=(rows, width))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
            raise BundleError(f"{path}: expected a table of {rows} x {width}; export the bundle again") from None
