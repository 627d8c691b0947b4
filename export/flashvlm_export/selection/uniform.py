"""Tokens evenly spaced."""

from __future__ import annotations

import math

import numpy as np
import torch

from flashvlm_export.selection.method import Method, Nodes, Selection, SelectionInputs, SelectionParams
from flashvlm_export.selection.ops import finish


def uniform(inputs: SelectionInputs, budget: int, params: SelectionParams, nodes: Nodes) -> Selection:
    """Tokens evenly spaced on the square patch grid, or along the raster where N is no square."""
    valid, tokens = inputs.valid, inputs.valid.shape[1]
    chosen = torch.zeros(tokens, dtype=torch.bool)
    chosen[evenly_spaced(tokens, budget)] = True
    # Should padding hold some of them, their replacements are spread as well: a golden-ratio sequence.
    spare = torch.from_numpy(np.arange(tokens) * 0.6180339887498949 % 1).float()
    nothing = torch.zeros_like(inputs.saliency, dtype=torch.float32)
    return finish(
        inputs,
        chosen.to(valid.device) & valid,
        torch.zeros_like(valid),
        nothing,
        budget,
        spare=nothing + spare.to(valid.device),
    )


def evenly_spaced(tokens: int, budget: int) -> list[int]:
    """Ascending indices of ``budget`` cells spread over a square grid, or over a line if N is no square."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        return _centres(tokens, budget)
    rows = round(math.sqrt(budget))
    widths = np.diff([budget * row // rows for row in range(rows + 1)])
    return [
        row * side + column
        for row, width in zip(_centres(side, rows), widths.tolist(), strict=True)
        for column in _centres(side, width)
    ]


def _centres(length: int, count: int) -> list[int]:
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


METHOD = Method("uniform", uniform, "tokens evenly spaced over the image")
