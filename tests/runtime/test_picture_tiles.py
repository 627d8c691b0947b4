"""Pictures of what was kept where an image was cut into tiles, and where a token is no square of it."""

import numpy as np
import pytest
from PIL import Image
from test_picture import panel, panels, photo
from test_token_boxes import SPECS

from flashvlm.drawing import Scale, ramp
from flashvlm.encoder import Selection
from flashvlm.kept_picture import PANEL, draw_kept, legend_of, legend_of_others
from flashvlm.patches import TOP, View, kept_patches, scored_patches
from flashvlm.preprocess import grid_of
from flashvlm.prompt import arrange
from flashvlm.token_boxes import is_thumbnail, token_boxes

TILED = ("anyres", "grid", "longest")
RED = (200, 0, 0)


def selection(name, size, kept, scores=None, is_top=True):
    """Of an image of ``size`` (width, height)."""
    spec = SPECS[name]
    grid = grid_of(size[::-1], spec.pixels)
    count = arrange(spec, grid).count
    kept = np.array(kept, dtype=np.int64)
    return Selection(
        kept, np.full(len(kept), is_top), np.zeros(count) if scores is None else np.asarray(scores), count, spec, grid
    )


def lit(page, number, height):
    """left, top, right, bottom of what is red in a panel, in its pixels."""
    shown = panel(page, number, height).astype(int)
    y, x = np.nonzero((np.abs(shown - RED) < 60).all(-1))
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("size", [(280, 140), (140, 140), (300, 200)])
def test_a_kept_token_lights_what_it_sees(name, size):
    """In the panel of tiles or of the thumbnail, whichever it is of, and in no other."""
    image = Image.new("RGB", size, RED)
    all_of_it = selection(name, size, [])
    boxes, small = token_boxes(all_of_it.spec, all_of_it.grid), is_thumbnail(all_of_it.spec, all_of_it.grid)
    assert small.any()
    height = round(PANEL * size[1] / size[0])
    # Deep inside the image: borders of the picture cut nothing off.
    inside = ((boxes[:, :2] > 0) & (boxes[:, 2:] < np.array(size))).all(1)
    for token in [*np.flatnonzero(inside & small)[:2], *np.flatnonzero(inside & ~small)[-2:]]:
        page = draw_kept(image, selection(name, size, [token]))
        assert panels(page) == 3
        number, other = (2, 1) if small[token] else (1, 2)
        wanted = boxes[token] * PANEL / size[0]
        assert np.abs(lit(page, number, height) - wanted).max() < 5  # outlines of 4 pixels lie within
        assert not (np.abs(panel(page, other, height).astype(int) - RED) < 60).all(-1).any()
        assert (panel(page, number, height) == TOP).all(-1).any()


@pytest.mark.parametrize("name", SPECS)
def test_all_kept_shows_the_image_itself(name):
    """Also where a thumbnail alone sees the edge of it."""
    image = photo(256, 303)
    count = selection(name, image.size, []).count
    page = draw_kept(image, selection(name, image.size, np.arange(count)))
    assert panels(page) == 2
    if name != "crop":
        height = round(PANEL * 303 / 256)
        np.testing.assert_array_equal(panel(page, 0, height), panel(page, 1, height))


@pytest.mark.parametrize("name", TILED)
def test_the_finest_score_is_seen(name):
    some = selection(name, (300, 200), [])
    boxes, small = token_boxes(some.spec, some.grid), is_thumbnail(some.spec, some.grid)
    view = View.of(Image.new("RGB", (300, 200), (128, 128, 128)), boxes, 600, 600)
    scores = np.where(small, 0.0, 1.0)  # dark for the thumbnail, bright for tiles
    shown = np.asarray(scored_patches(view, scores, Scale(0, 1)), dtype=int)
    bright = np.abs(shown - (0.82 * ramp(np.array(1.0)) + 0.18 * 127)).max(-1) < 3
    assert bright[10:-10, 10:-10].all()
    # Where no tile is, the thumbnail's is.
    only = np.asarray(scored_patches(view, np.where(small, 0.0, np.nan), Scale(0, 1)), dtype=int)
    assert (np.ptp(only[100, 300]) == 0).all()


@pytest.mark.parametrize("name", SPECS)
def test_legends_add_up(name):
    rng = np.random.default_rng(0)
    some = selection(name, (300, 200), [])
    placed = ~np.isnan(token_boxes(some.spec, some.grid)[:, 0])
    kept = np.sort(rng.choice(np.flatnonzero(placed), 7, replace=False))
    some = selection(name, (300, 200), kept)
    small = is_thumbnail(some.spec, some.grid)
    entries = [*legend_of_others(placed, some)]
    for layer in (placed & small, placed & ~small):
        entries += legend_of(np.flatnonzero(layer), some)
    assert sum(int(entry.text.split()[0].replace(",", "")) for entry in entries) == some.count
    others = [entry.text.split()[1] for entry in legend_of_others(placed, some)]
    assert others == {"anyres": ["newlines"], "cls": ["CLS"]}.get(name, [])


@pytest.mark.parametrize("size", [(100, 300), (300, 100), (90, 90), (4000, 40), (40, 4000)])
def test_cells_of_any_aspect(size):
    """An image resized exactly, 2 x 6 tokens whatever its shape: cells are no squares."""
    image = Image.new("RGB", size, RED)
    some = selection("exact", size, [7], np.linspace(-3, 0, 12))
    view = View.of(image, token_boxes(some.spec, some.grid), 560, 840)
    width, height = view.photo.size
    assert max(width / 560, height / 840) == 1
    assert abs(width / height - size[0] / size[1]) <= 0.02 * size[0] / size[1] or min(width, height) < 50
    shown = np.asarray(kept_patches(view, np.arange(12), some.kept, some.is_top), dtype=int)
    clear = (shown == RED).all(-1) | (shown == TOP).all(-1)
    top, left = round(height / 2), round(width / 6)
    assert clear[top + 1 :, left + 1 : round(width / 3) - 1].all()
    clear[max(0, top - 1) :, max(0, left - 1) : round(width / 3) + 1] = False
    assert not clear.any()
    assert panels(draw_kept(image, some)) == 3


def test_a_line_of_one_pixel_is_widened():
    """Of many small patches one is found."""
    some = selection("longest", (900, 900), [100])
    view = View.of(Image.new("RGB", (900, 900)), token_boxes(some.spec, some.grid), 96, 96)
    tokens = np.flatnonzero(~is_thumbnail(some.spec, some.grid))
    shown = np.asarray(kept_patches(view, tokens, some.kept, some.is_top))
    assert (shown == TOP).all(-1).sum() >= 4 * 8
