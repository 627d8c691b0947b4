"""Boxes of tokens against the pixels that the model gets: an image whose colours say where they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvlm.preprocess import AnyRes, GridTiles, LongestEdge, Pixels, Single, grid_of, tile
from flashvlm.prompt import arrange
from flashvlm.token_boxes import is_thumbnail, token_boxes, token_units
from flashvlm.visual import VisualSpec

PLAIN: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "resample": "bilinear"}
SIDE = 24


def spec(pixels: Pixels, grid: tuple[int, int], **more: Any) -> VisualSpec:
    n = grid[0] * grid[1] + (more.get("skip") == "cls")
    candidates = pixels.max_units * n
    if isinstance(pixels, AnyRes):
        more["order"] = "anyres"
        rows = [(h // SIDE * grid[0]) * (w // SIDE * grid[1] + 1) for h, w in pixels.pinpoints]
        candidates = n + max(rows)
    return VisualSpec(
        graph="vision", placeholder_id=0, tokens_per_unit=n, grid=grid, candidates=candidates, feature_size=1,
        pixels=pixels, **more,
    )  # fmt: skip


SPECS = {
    "crop": spec(Single(resize="shortest_edge", size=(SIDE, SIDE), crop=(SIDE, SIDE), **PLAIN), (4, 4)),
    "exact": spec(Single(resize="exact", size=(24, 36), **PLAIN), (2, 6)),
    "anyres": spec(
        AnyRes(side=SIDE, pinpoints=tuple((SIDE * r, SIDE * c) for r, c in ((1, 2), (2, 1), (2, 2), (1, 3))), **PLAIN),
        (4, 4),
    ),
    "grid": spec(GridTiles(side=SIDE, min_tiles=1, max_tiles=6, **PLAIN), (3, 4)),
    "longest": spec(LongestEdge(side=SIDE, edge=3 * SIDE, **PLAIN), (4, 4)),
    "cls": spec(GridTiles(side=SIDE, min_tiles=1, max_tiles=3, **PLAIN), (3, 3), skip="cls"),
}


def seen_centres(of: VisualSpec, size: tuple[int, int]) -> np.ndarray:
    """float [N,2]: x and y at the centre of what a token's pixels show; NaN for newlines and CLS."""
    height, width = size
    places = np.zeros((height, width, 3), np.float32)
    places[..., 0], places[..., 1] = np.arange(width), np.arange(height)[:, None]
    image = PIL.Image.fromarray(np.rint(places / [width, height, 1] * 250).astype(np.uint8))
    units = tile(image, of.pixels)[0][:, :2] * 255 / 250  # [U,2,H,W], shares of the image
    rows, columns = of.grid
    count, _, h, w = units.shape
    cells = units.reshape(count, 2, rows, h // rows, columns, w // columns).mean(axis=(3, 5))
    centres = cells.reshape(count, 2, -1).transpose(0, 2, 1) * [width, height] + 0.5  # [U,cells,2]
    if of.skip == "cls":
        centres = np.pad(centres, ((0, 0), (1, 0), (0, 0)), constant_values=np.nan)
    found = arrange(of, grid_of(size, of.pixels))
    flat = np.concatenate([np.full((1, 2), np.nan), centres.reshape(-1, 2)])
    return flat[found.order[: found.count]]


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=25, deadline=None)
@given(size=st.tuples(st.integers(30, 400), st.integers(30, 400)).filter(lambda s: max(s) <= 4 * min(s)))
def test_a_box_is_what_the_tokens_pixels_show(name: str, size: tuple[int, int]) -> None:
    of = SPECS[name]
    grid = grid_of(size, of.pixels)
    boxes, wanted = token_boxes(of, grid), seen_centres(of, size)
    assert boxes.shape == (len(wanted), 4)
    assert (np.isnan(boxes).any(1) == np.isnan(wanted).any(1)).all()
    whole = np.array([size[1], size[0]])
    inside = ((boxes[:, :2] >= -1e-6) & (boxes[:, 2:] <= whole + 1e-6)).all(1)  # beyond the image there is padding
    assert inside.any()
    step = boxes[inside, 2:] - boxes[inside, :2]
    off = np.abs((boxes[:, :2] + boxes[:, 2:]) / 2 - wanted)[inside]
    # Sizes are whole pixels while they are resized, and colours are whole numbers.
    assert (off <= 0.1 * step + 0.01 * whole).all(), (off / step).max()


def test_the_boxes_of_an_image_made_a_square() -> None:
    of = spec(AnyRes(side=SIDE, pinpoints=((SIDE, SIDE),), border=(9, 9, 9), **PLAIN), (4, 4))
    grid = grid_of((30, 62), of.pixels, several=True)
    boxes = token_boxes(of, grid)
    assert boxes.shape == (17, 4)
    assert boxes[0].tolist() == [0, -16, 15.5, -0.5]
    assert boxes[15].tolist() == [46.5, 30.5, 62, 46]
    assert np.isnan(boxes[16]).all()
    assert not is_thumbnail(of, grid).any()
    units = tile(PIL.Image.new("RGB", (62, 30), (200, 0, 0)), of.pixels, several=True)[0]
    shown = units[0, 0].mean(axis=1) > 100 / 255
    assert shown.nonzero()[0].tolist() == [*range(6, 18)]  # of rows 6.2 to 17.8


def test_units() -> None:
    of = SPECS["grid"]
    grid = grid_of((90, 200), of.pixels)  # 1 x 2 tiles
    assert token_units(of, grid).tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert is_thumbnail(of, grid).tolist() == [False] * 24 + [True] * 12
    first = SPECS["anyres"]
    grid = grid_of((90, 200), first.pixels)
    assert is_thumbnail(first, grid).nonzero()[0].tolist() == [*range(16)]
    assert (token_units(first, grid) == -1).sum() == np.isnan(token_boxes(first, grid)[:, 0]).sum() > 0
    assert not is_thumbnail(SPECS["crop"], grid_of((9, 9), SPECS["crop"].pixels)).any()


def test_tokens_of_tiles_leave_no_gap() -> None:
    for size in ((97, 211), (301, 75), (64, 64)):
        for of in SPECS.values():
            grid = grid_of(size, of.pixels)
            boxes = token_boxes(of, grid)[~is_thumbnail(of, grid)]
            boxes = boxes[~np.isnan(boxes[:, 0])]
            for axis in (0, 1):
                starts, ends = {*boxes[:, axis]}, {*boxes[:, axis + 2]}
                assert len(starts - ends) == len(ends - starts) == 1


def test_the_thumbnail_sees_the_whole_image() -> None:
    for name in ("anyres", "grid", "longest"):
        of = SPECS[name]
        grid = grid_of((50, 131), of.pixels)
        boxes = token_boxes(of, grid)[is_thumbnail(of, grid)]
        assert boxes.min(0)[:2].tolist() == [0, 0]
        assert boxes.max(0)[2:] == pytest.approx((131, 50))
        assert len(boxes) == of.tokens_per_unit
