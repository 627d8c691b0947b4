"""Arrays against the contract of a graph: dtype, rank and sizes as the bundle's manifest states them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from flashvlm.errors import FlashVLMError
from flashvlm.graph_io import TensorSpec

NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}


def check(spec: TensorSpec, dtype: Any, shape: Sequence[int], symbols: dict[str, int]) -> None:
    """Refuses a tensor that is not as ``spec`` says. ``symbols`` holds the sizes met so far, and learns new ones."""

    def fits(dimension: int | str, size: int) -> bool:
        return size == (symbols.setdefault(dimension, size) if isinstance(dimension, str) else dimension)

    same_rank = len(shape) == len(spec.shape)
    if np.dtype(dtype) != NUMPY_DTYPES[spec.dtype] or not same_rank or not all(map(fits, spec.shape, shape)):
        raise FlashVLMError(
            f"{spec.name}: expected {spec.dtype} {list(spec.shape)}, found {np.dtype(dtype)} {list(shape)}"
        )


def shape_of(spec: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of a tensor with its symbols replaced."""
    return tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)


def present(past: str) -> str:
    """The output that follows a cache input: past_key_values.0.key -> present.0.key."""
    return past.replace("past_key_values.", "present.")


def is_past(spec: TensorSpec) -> bool:
    return spec.name.startswith("past_key_values.")
