"""RGB -> the float32 pixels that a vision tower expects: one way of tiling each, told apart by their ``tiling``.

The arithmetic follows transformers' PIL image processors step by step (resize in uint8, crop, rescale in float64,
normalise in float32), so that a bundle answers as its checkpoint does, without transformers. No model is named here:
a bundle's manifest says which of these it wants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import PIL.Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flashvlm.images import load_image

RESAMPLE = {
    "nearest": PIL.Image.Resampling.NEAREST,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Edge = Annotated[int, Field(gt=0, le=4096)]  # pixels: beyond every vision tower there is
Count = Annotated[int, Field(gt=0, le=64)]  # tiles of an image
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the original image


class _Pixels(BaseModel):
    """What all share. Sizes are (height, width); mean and std apply after rescale.

    repeat_time: how often one image stands behind another along the channels, for towers that read frames in pairs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    resample: Resample = "bicubic"
    rescale: float = Field(default=1 / 255, gt=0, le=1)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    repeat_time: Literal[1, 2] = 1

    @model_validator(mode="after")
    def _check_std(self) -> _Pixels:
        if min(self.std) <= 0:
            raise ValueError(f"expected std > 0, found {self.std}")
        return self

    @property
    def channels(self) -> int:
        return 3 * self.repeat_time


class Single(_Pixels):
    """One unit an image: resized by its shorter edge or exactly, then cropped at its centre."""

    tiling: Literal["single"] = "single"
    resize: Literal["shortest_edge", "exact"]
    size: tuple[Edge, Edge]
    crop: tuple[Edge, Edge] | None = None

    @model_validator(mode="after")
    def _check_size(self) -> Single:
        if self.resize == "shortest_edge" and self.size[0] != self.size[1]:
            raise ValueError(f"shortest_edge needs size (edge, edge), found {self.size}")
        if self.resize == "shortest_edge" and self.crop is None:
            raise ValueError("shortest_edge needs a crop: a graph takes pixels of one size")
        if self.crop and (self.crop[0] > self.size[0] or self.crop[1] > self.size[1]):
            raise ValueError(f"crop {self.crop} is larger than the resized image {self.size}; padding is not supported")
        return self

    @property
    def unit_shape(self) -> tuple[int, int, int]:
        """[C,H,W] of a unit."""
        return self.channels, *(self.crop or self.size)

    @property
    def max_units(self) -> int:
        return 1

    @property
    def may_have_thumbnail(self) -> bool:
        """Whether the whole image may stand behind its tiles."""
        return False


class _Tiled(_Pixels):
    """Square tiles of ``side`` pixels."""

    side: Edge

    @property
    def unit_shape(self) -> tuple[int, int, int]:
        """[C,H,W] of a unit."""
        return self.channels, self.side, self.side


class AnyRes(_Tiled):
    """A thumbnail, then the tiles of the canvas that fits best, on which the image is padded (LLaVA-NeXT).

    pinpoints: (height, width) of the canvases.
    """

    tiling: Literal["anyres"] = "anyres"
    pinpoints: tuple[tuple[Edge, Edge], ...] = Field(min_length=1, max_length=64)

    @model_validator(mode="after")
    def _check_pinpoints(self) -> AnyRes:
        for height, width in self.pinpoints:
            if height % self.side or width % self.side:
                raise ValueError(f"expected pinpoints in multiples of {self.side}, found {(height, width)}")
        return self

    @property
    def max_units(self) -> int:
        return 1 + max(height * width for height, width in self.pinpoints) // self.side**2

    @property
    def may_have_thumbnail(self) -> bool:
        return False  # it stands before them


class GridTiles(_Tiled):
    """The grid of ``min_tiles`` to ``max_tiles`` whose aspect ratio is nearest, then a thumbnail if there are several
    (InternVL)."""

    tiling: Literal["grid"] = "grid"
    min_tiles: Count
    max_tiles: Count
    thumbnail: bool = True

    @model_validator(mode="after")
    def _check_tiles(self) -> GridTiles:
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"expected min_tiles up to max_tiles, found {self.min_tiles} and {self.max_tiles}")
        return self

    @property
    def max_units(self) -> int:
        return self.max_tiles + self.may_have_thumbnail

    @property
    def may_have_thumbnail(self) -> bool:
        return self.thumbnail and self.max_tiles > 1


class LongestEdge(_Tiled):
    """Resized to its longer edge and to multiples of ``side``, then tiles and a thumbnail if there are several
    (SmolVLM)."""

    tiling: Literal["longest"] = "longest"
    edge: Edge

    @property
    def max_units(self) -> int:
        # An aspect of 1 has the most; its shorter edge is made even.
        tiles = math.ceil((self.edge + self.edge % 2) / self.side) ** 2
        return tiles + (tiles > 1)

    @property
    def may_have_thumbnail(self) -> bool:
        return self.max_units > 1


Pixels = Annotated[Single | AnyRes | GridTiles | LongestEdge, Field(discriminator="tiling")]


class Grid(NamedTuple):
    """How an image became units.

    rows, columns  of tiles; 1 x 1 is the whole image
    thumbnail      where the whole image stands beside its tiles
    size           (height, width) of the original
    """

    rows: int
    columns: int
    thumbnail: Literal["none", "first", "last"]
    size: tuple[int, int]

    @property
    def units(self) -> int:
        return self.rows * self.columns + (self.thumbnail != "none")


@dataclass(frozen=True)
class _Plan:
    """Resize to each size of ``steps`` in turn, paste on black at ``offset`` of ``canvas`` or crop there, cut into the
    grid. Sizes are (width, height), as PIL has them."""

    grid: Grid
    steps: tuple[tuple[int, int], ...]
    canvas: tuple[int, int]
    offset: tuple[int, int] = (0, 0)


def grid_of(size: tuple[int, int], pixels: Pixels) -> Grid:
    """The units an image of ``size`` (height, width) becomes."""
    return _plan(size, pixels).grid


def tile(image: PIL.Image.Image, pixels: Pixels) -> tuple[np.ndarray, Grid]:
    """RGB image -> float32 [U,C,H,W], its units in the order of the vision graph, and how they came about."""
    if image.mode != "RGB":
        image = load_image(image)
    plan = _plan((image.height, image.width), pixels)
    resample = RESAMPLE[pixels.resample]
    sheet = image
    for size in plan.steps:
        sheet = sheet.resize(size, resample)
    left, top = plan.offset  # a crop beyond the sheet is black
    whole = image if len(plan.steps) == 1 else sheet
    sheet = sheet.crop((-left, -top, plan.canvas[0] - left, plan.canvas[1] - top))
    units = list(_cut(sheet, plan.grid.rows, plan.grid.columns))
    if plan.grid.thumbnail != "none":
        _, height, width = pixels.unit_shape
        units.insert(0 if plan.grid.thumbnail == "first" else len(units), whole.resize((width, height), resample))
    return np.stack([_normalise(unit, pixels) for unit in units]), plan.grid


def seen_box(size: tuple[int, int], pixels: Pixels) -> Box:
    """The part of an original image of ``size`` (height, width) that its grid of tiles covers, in its pixels; beyond
    the image where it is padded."""
    plan = _plan(size, pixels)
    width, height = plan.steps[-1]
    x, y = size[1] / width, size[0] / height
    left, top = plan.offset
    return -left * x, -top * y, (plan.canvas[0] - left) * x, (plan.canvas[1] - top) * y


def _normalise(image: PIL.Image.Image, pixels: Pixels) -> np.ndarray:
    """uint8 image -> float32 [C,H,W]."""
    # float64 for the product and float32 from there on: transformers' own order of rounding.
    scaled = (np.asarray(image).astype(np.float64) * pixels.rescale).astype(np.float32)
    normal = (scaled - np.asarray(pixels.mean, np.float32)) / np.asarray(pixels.std, np.float32)
    planes = normal.transpose(2, 0, 1)  # [3,H,W]
    return np.ascontiguousarray(np.concatenate([planes] * pixels.repeat_time) if pixels.repeat_time > 1 else planes)


def _cut(sheet: PIL.Image.Image, rows: int, columns: int) -> Iterator[PIL.Image.Image]:
    width, height = sheet.width // columns, sheet.height // rows
    for row in range(rows):
        for column in range(columns):
            yield sheet.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))


# --- the four tilings: where each pixel of the original goes ---------------------------------------------------------


def _plan(size: tuple[int, int], pixels: Pixels) -> _Plan:
    match pixels:
        case Single():
            return _single(size, pixels)
        case AnyRes():
            return _anyres(size, pixels)
        case GridTiles():
            return _grid(size, pixels)
        case LongestEdge():
            return _longest(size, pixels)


def _single(size: tuple[int, int], pixels: Single) -> _Plan:
    height, width = size
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


def _longest(size: tuple[int, int], pixels: LongestEdge) -> _Plan:
    height, width = size
    aspect = width / height
    if width >= height:
        width, height = pixels.edge, _even(int(pixels.edge / aspect))
    else:
        width, height = _even(int(pixels.edge * aspect)), pixels.edge
    first = width, height
    aspect = width / height
    if width >= height:
        columns = math.ceil(width / pixels.side)
        rows = math.ceil(int(columns * pixels.side / aspect) / pixels.side)
    else:
        rows = math.ceil(height / pixels.side)
        columns = math.ceil(int(rows * pixels.side * aspect) / pixels.side)
    thumbnail: Literal["none", "last"] = "last" if rows * columns > 1 else "none"
    canvas = columns * pixels.side, rows * pixels.side
    return _Plan(Grid(rows, columns, thumbnail, size), (first, canvas), canvas)


def _even(length: int) -> int:
    return max(length + length % 2, 1)
