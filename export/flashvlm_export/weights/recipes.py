"""How a parameter of a checkpoint is stored in a bundle: as one tensor or, quantized, as several."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flashvlm_export.checkpoint import StoredTensor
from flashvlm_export.dtypes import DTYPES

Make = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Stored:
    """One tensor of a bundle.

    make    fills it, given the parameter as the checkpoint has it and an empty tensor of this dtype and shape. Equal
            ones make equal bytes, and those are stored once: a function of a module, or a frozen dataclass.
    suffix  behind the name of the initializer, to tell several of one parameter apart: ".scales"
    """

    dtype: str
    shape: tuple[int, ...]
    make: Make
    suffix: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].size


@dataclass(frozen=True)
class Recipe:
    """A parameter, and every tensor that is stored of it."""

    source: StoredTensor
    outputs: tuple[Stored, ...]


def copied(source: Tensor, out: Tensor) -> None:
    """As it is, rounded to the dtype of ``out``."""
    out.copy_(source)


def transposed(source: Tensor, out: Tensor) -> None:
    """[rows, columns] -> [columns, rows]."""
    out.copy_(source.t())


def plain(source: StoredTensor, dtype: str, transpose: bool = False) -> Recipe:
    """One tensor in ``dtype``, transposed or not."""
    shape = source.shape[::-1] if transpose else source.shape
    return Recipe(source, (Stored(dtype, shape, transposed if transpose else copied),))
