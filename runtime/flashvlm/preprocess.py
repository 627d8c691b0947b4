"""RGB -> the float32 pixels that a vision tower expects, as a bundle's ``tilings`` setting says.

The arithmetic follows transformers' PIL image processors step by step (resize in uint8, crop, rescale in float64,
normalise in float32), so that a bundle answers as its checkpoint does, without transformers. No model is named here:
a bundle's manifest says what it wants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image

from flashvlm.frames import Clip
from flashvlm.images import load_image
from flashvlm.tilings import RESAMPLE, AnyRes, Frames, GridTiles, LongestEdge, Pixels, Single

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the original image


class Grid(NamedTuple):
    """How an image or a video became units.

    rows, columns  of tiles; 1 x 1 is the whole image, or each frame
    thumbnail      where the whole image stands beside its tiles
    size           (height, width) of the original
    clip           of a video, its frames
    square         it is one unit with a border that makes it a square: one of several images of a prompt
    """

    rows: int
    columns: int
    thumbnail: Literal["none", "first", "last"]
    size: tuple[int, int]
    clip: Clip | None = None
    square: bool = False

    @property
    def units(self) -> int:
        if self.clip is not None:
            return self.clip.units
        return self.rows * self.columns + (self.thumbnail != "none")


@dataclass(frozen=True)
class _Plan:
    """A border that makes it a square, if any; resize to each size of ``steps`` in turn, paste on black at ``offset``
    of ``canvas`` or crop there, cut into the grid. Sizes are (width, height), as PIL has them."""

    grid: Grid
    steps: tuple[tuple[int, int], ...]
    canvas: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    border: tuple[int, int, int] | None = None


def grid_of(size: tuple[int, int], pixels: Pixels, clip: Clip | None = None, several: bool = False) -> Grid:
    """The units that an image of ``size`` (height, width) becomes, or the frames ``clip`` of a video.

    several: the image is one of several of its prompt.
    """
    return _plan(size, pixels, several).grid._replace(clip=clip)


def tile(image: PIL.Image.Image, pixels: Pixels, several: bool = False) -> tuple[np.ndarray, Grid]:
    """RGB image -> float32 [U,C,H,W], its units in the order of the vision graph, and how they came about."""
    if image.mode != "RGB":
        image = load_image(image)
    plan = _plan((image.height, image.width), pixels, several)
    resample = RESAMPLE[pixels.resample]
    sheet = image if plan.border is None else _square(image, plan.border)
    for size in plan.steps:
        sheet = sheet.resize(size, resample)
    left, top = plan.offset  # a crop beyond the sheet is black
    whole = image if len(plan.steps) == 1 else sheet
    sheet = sheet.crop((-left, -top, plan.canvas[0] - left, plan.canvas[1] - top))
    units = list(_cut(sheet, plan.grid.rows, plan.grid.columns))
    if plan.grid.thumbnail != "none":
        _, height, width = pixels.unit_shape
        units.insert(0 if plan.grid.thumbnail == "first" else len(units), whole.resize((width, height), resample))
    normal = [_normalise(unit, pixels) for unit in units]
    return np.stack([np.concatenate([unit] * pixels.repeat_time) for unit in normal]), plan.grid


def stack(frames: Sequence[PIL.Image.Image], pixels: Frames) -> np.ndarray:
    """RGB frames, all of one size -> float32 [U,C,H,W]."""
    once = pixels.model_copy(update={"repeat_time": 1})
    planes = np.concatenate([tile(frame, once)[0] for frame in frames])
    lacking = -len(frames) % pixels.repeat_time
    planes = np.concatenate([planes, np.repeat(planes[-1:], lacking, axis=0)])  # [F,3,H,W]
    return planes.reshape(-1, *pixels.unit_shape)


def seen_box(size: tuple[int, int], pixels: Pixels, several: bool = False) -> Box:
    """The part of an original image of ``size`` (height, width) that its grid of tiles covers, in its pixels; beyond
    the image where it is padded."""
    plan = _plan(size, pixels, several)
    if plan.border is not None:
        edge, left, top = _around(size)
        return -left, -top, edge - left, edge - top
    width, height = plan.steps[-1]
    x, y = size[1] / width, size[0] / height
    left, top = plan.offset
    return -left * x, -top * y, (plan.canvas[0] - left) * x, (plan.canvas[1] - top) * y


def _normalise(image: PIL.Image.Image, pixels: Pixels) -> np.ndarray:
    """uint8 image -> float32 [3,H,W]."""
    # float64 for the product and float32 from there on: transformers' own order of rounding.
    scaled = (np.asarray(image).astype(np.float64) * pixels.rescale).astype(np.float32)
    normal = (scaled - np.asarray(pixels.mean, np.float32)) / np.asarray(pixels.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))


def _around(size: tuple[int, int]) -> tuple[int, int, int]:
    """Edge of the square around an image of ``size`` (height, width), and where the image lies in it: left, top."""
    edge = max(size)
    return edge, (edge - size[1]) // 2, (edge - size[0]) // 2


def _square(image: PIL.Image.Image, border: tuple[int, int, int]) -> PIL.Image.Image:
    edge, left, top = _around((image.height, image.width))
    square = PIL.Image.new("RGB", (edge, edge), border)
    square.paste(image, (left, top))
    return square


def _cut(sheet: PIL.Image.Image, rows: int, columns: int) -> Iterator[PIL.Image.Image]:
    width, height = sheet.width // columns, sheet.height // rows
    for row in range(rows):
        for column in range(columns):
            yield sheet.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))


# --- the four tilings: where each pixel of the original goes ---------------------------------------------------------


def _plan(size: tuple[int, int], pixels: Pixels, several: bool) -> _Plan:
    match pixels:
        case Single() | Frames():
            return _single(size, pixels)
        case AnyRes(border=tuple()) if several:
            edges = pixels.side, pixels.side
            return _Plan(Grid(1, 1, "none", size, square=True), (edges,), edges, border=pixels.border)
        case AnyRes():
            return _anyres(size, pixels)
        case GridTiles():
            return _grid(size, pixels)
        case LongestEdge():
            return _longest(size, pixels.edge, pixels.side)


def _single(size: tuple[int, int], pixels: Single | Frames) -> _Plan:
    height, width = size
    if pixels.resize == "longest_edge":
        return _longest(size, pixels.size[0], pixels.size[0])
    if pixels.resize == "exact":
        resized = pixels.size[1], pixels.size[0]
    else:  # the longer edge is truncated, not rounded, as in transformers
        edge = pixels.size[0]
        resized = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
    crop = (pixels.crop[1], pixels.crop[0]) if pixels.crop else resized
    offset = -((resized[0] - crop[0]) // 2), -((resized[1] - crop[1]) // 2)
    return _Plan(Grid(1, 1, "none", size), (resized,), crop, offset)


def _anyres(size: tuple[int, int], pixels: AnyRes) -> _Plan:
    height, width = size
    canvas_height, canvas_width = best_pinpoint(size, pixels.pinpoints)
    across, down = canvas_width / width, canvas_height / height
    if across < down:
        resized = canvas_width, min(math.ceil(height * across), canvas_height)
    else:
        resized = min(math.ceil(width * down), canvas_width), canvas_height
    offset = (canvas_width - resized[0]) // 2, (canvas_height - resized[1]) // 2
    grid = Grid(canvas_height // pixels.side, canvas_width // pixels.side, "first", size)
    return _Plan(grid, (resized,), (canvas_width, canvas_height), offset)


def best_pinpoint(size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The canvas on which most pixels of the image are left, then the smallest of those; (height, width) all."""

    def rank(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / size[1], canvas[0] / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return shown, shown - canvas[0] * canvas[1]

    return max(pinpoints, key=rank)


def _grid(size: tuple[int, int], pixels: GridTiles) -> _Plan:
    height, width = size
    best, smallest = (1, 1), math.inf
    most = range(1, pixels.max_tiles + 1)
    shapes = [(c, r) for c in most for r in most if pixels.min_tiles <= c * r <= pixels.max_tiles]
    for columns, rows in sorted(shapes, key=math.prod):
        difference = abs(width / height - columns / rows)
        # Of equal ones the larger, until it is more than twice the image.
        fits = difference == smallest and width * height > 0.5 * pixels.side**2 * columns * rows
        if difference < smallest or fits:
            best, smallest = (columns, rows), difference
    columns, rows = best
    thumbnail: Literal["none", "last"] = "last" if pixels.thumbnail and columns * rows > 1 else "none"
    canvas = columns * pixels.side, rows * pixels.side
    return _Plan(Grid(rows, columns, thumbnail, size), (canvas,), canvas)


def _longest(size: tuple[int, int], edge: int, side: int) -> _Plan:
    height, width = size
    aspect = width / height
    if width >= height:
        width, height = edge, _even(int(edge / aspect))
    else:
        width, height = _even(int(edge * aspect)), edge
    first = width, height
    aspect = width / height
    if width >= height:
        columns = math.ceil(width / side)
        rows = math.ceil(int(columns * side / aspect) / side)
    else:
        rows = math.ceil(height / side)
        columns = math.ceil(int(rows * side * aspect) / side)
    thumbnail: Literal["none", "last"] = "last" if rows * columns > 1 else "none"
    canvas = columns * side, rows * side
    return _Plan(Grid(rows, columns, thumbnail, size), (first, canvas), canvas)


def _even(length: int) -> int:
    return max(length + length % 2, 1)
