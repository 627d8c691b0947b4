"""What of an image each of its visual tokens sees: the places that pictures of a selection are drawn on."""

from __future__ import annotations

import numpy as np

from flashvlm.preprocess import Grid, seen_box
from flashvlm.prompt import arrange
from flashvlm.visual import VisualSpec


def token_boxes(spec: VisualSpec, grid: Grid) -> np.ndarray:
    """float64 [N,4] of an item's N tokens, in reading order: left, top, right and bottom of what each sees, in pixels
    of the original image or frame; beyond it where it is padded. NaN for newlines and CLS tokens.

    Neighbours share their borders to the last bit, also those in different tiles.

    Example:
        >>> token_boxes(spec, grid_of((480, 640), spec.pixels))[0]  # doctest: +SKIP
        array([ 80.,   0., 100.,  20.])
    """
    unit, cell = _units_and_cells(spec, grid)
    rows, columns = spec.grid
    tile_row, tile_column = np.divmod((unit - (grid.thumbnail == "first")) % (grid.rows * grid.columns), grid.columns)
    row, column = np.divmod(cell, columns)
    left, top, right, bottom = seen_box(grid.size, spec.pixels, grid.square)
    xs = _edges(left, right, tile_column * columns + column, grid.columns * columns)
    ys = _edges(top, bottom, tile_row * rows + row, grid.rows * rows)
    whole = is_thumbnail(spec, grid)
    xs[:, whole] = _edges(0, grid.size[1], column[whole], columns)
    ys[:, whole] = _edges(0, grid.size[0], row[whole], rows)
    boxes = np.stack([xs[0], ys[0], xs[1], ys[1]], axis=1)
    boxes[(unit < 0) | (cell < 0)] = np.nan
    return boxes


def token_units(spec: VisualSpec, grid: Grid) -> np.ndarray:
    """int64 [N]: which tile or frame each token of an item is of; -1 for newlines."""
    return _units_and_cells(spec, grid)[0]


def is_thumbnail(spec: VisualSpec, grid: Grid) -> np.ndarray:
    """bool [N]: tokens of the whole image that stands beside its tiles."""
    units = token_units(spec, grid)
    if grid.thumbnail == "none":
        return np.zeros(len(units), dtype=np.bool_)
    return units == (0 if grid.thumbnail == "first" else grid.units - 1)


def _edges(low: float, high: float, index: np.ndarray, count: int) -> np.ndarray:
    """float64 [2,n]: where cells begin and end, of ``count`` between ``low`` and ``high``."""
    return low + (high - low) / count * np.stack([index, index + 1])


def _units_and_cells(spec: VisualSpec, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N] each: the unit of a token, -1 for newlines; and its place there, row by row, -1 for CLS."""
    arrangement = arrange(spec, grid)
    token = arrangement.order[: arrangement.count] - 1
    unit = token // spec.tokens_per_unit  # of a newline, -1: -1
    return unit, token % spec.tokens_per_unit - (spec.skip == "cls")
