"""What towers share whose images are several tiles."""

from __future__ import annotations

import torch
from torch import Tensor


def in_reading_order(tokens: Tensor, order: Tensor, newline: Tensor | None = None) -> Tensor:
    """Tokens of all tiles [U,n,*] -> candidates [1,N,*] as ``order`` int64 [N] says.

    0 in it is the newline [*], zeros where there is none; 1 is the first token of the first tile.
    """
    flat = tokens.flatten(0, 1)
    first = torch.zeros_like(flat[:1]) if newline is None else newline.expand_as(flat[:1])
    return torch.cat([first, flat]).index_select(0, order)[None]
