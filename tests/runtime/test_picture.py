import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flashvlm import kept_picture as picture
from flashvlm.kept_picture import MARGIN, PANEL, REPRESENTATIVE, TOP, draw_kept

PANEL_Y = MARGIN + 42


def photo(width, height, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


def left_panel(page, height):
    return np.asarray(page)[PANEL_Y : PANEL_Y + height, MARGIN : MARGIN + PANEL]


def right_panel(page, height):
    x = 2 * MARGIN + PANEL
    return np.asarray(page)[PANEL_Y : PANEL_Y + height, x : x + PANEL]


SIZES = [(1, 1), (3, 500), (640, 427), (20_000, 100), (100, 20_000)]
GRIDS = [(1, 1), (4, 4), (5, 5), (3, 70)]


@pytest.mark.parametrize(("size", "grid"), [(s, (24, 24)) for s in SIZES] + [((300, 200), g) for g in GRIDS])
def test_any_size_and_grid(size, grid):
    count = grid[0] * grid[1]
    edge = min(size)
    left, top = (size[0] - edge) / 2, (size[1] - edge) / 2
    kept = np.unique([0, count // 2, count - 1])
    page = draw_kept(
        photo(*size),
        kept,
        kept == 0,
        np.arange(count),
        grid,
        (left, top, left + edge, top + edge),
        "Q?",
        "A.",
    )
    assert page.mode == "RGB"
    assert page.width == 2 * PANEL + 3 * MARGIN
    assert page.height < 1500
    # Thin images show the crop large enough for outlines of both colours.
    colours = {tuple(c) for c in left_panel(page, page.height - PANEL_Y).reshape(-1, 3)}
    assert count == 1 or {TOP, REPRESENTATIVE} <= colours


def test_kept_patches_are_clear_and_dropped_ones_are_not():
    # A white image with one red patch, number 6 of a 4 x 4 grid over the central square.
    pixels = np.full((160, 320, 3), 255, np.uint8)
    pixels[40:80, 80 + 80 : 80 + 120] = (200, 0, 0)
    page = draw_kept(
        Image.fromarray(pixels), np.array([6]), np.array([True]), np.arange(16.0), (4, 4), (80, 0, 240, 160)
    )
    panel = left_panel(page, 320)
    clear = (panel == (200, 0, 0)).all(-1)
    assert clear[86:154, 326:394].all()  # all but the outline of 4 pixels and the blur of resizing
    assert not clear[:80].any()
    assert not clear[:, 400:].any()
    assert (panel[[80, 159], 350] == TOP).all()
    dropped = panel[100, 200]
    assert len(set(dropped.tolist())) == 1
    assert dropped[0] < 128
    unseen = panel[:, :158].reshape(-1, 3)
    assert (unseen > 160).all()
    assert len(np.unique(unseen, axis=0)) > 1  # hatched


def test_heat_map_follows_the_scores():
    gray = Image.new("RGB", (64, 64), (128, 128, 128))
    scores = np.linspace(-3, 5, 16)
    scores[5] = -np.inf
    scores[6] = np.nan
    page = draw_kept(gray, np.array([15]), np.array([True]), scores, (4, 4), (0, 0, 64, 64))
    centres = right_panel(page, 640)[80::160, 80::160].reshape(16, 3).astype(int)
    light = centres @ [0.2126, 0.7152, 0.0722]
    finite = np.isfinite(scores)
    assert (np.diff(light[finite]) > 0).all()
    assert (np.ptp(centres[~finite], axis=1) == 0).all()


@pytest.mark.parametrize("scores", [np.zeros(16), np.zeros(0), np.full(16, np.nan)])
def test_a_method_without_score(scores):
    red = Image.new("RGB", (64, 64), (200, 30, 30))
    page = draw_kept(red, np.array([3]), np.array([False]), scores, (4, 4), (0, 0, 64, 64))
    assert (np.ptp(right_panel(page, 640)[:250].astype(int), axis=-1) == 0).all()


@pytest.mark.parametrize("scores", [np.full(16, 0.25), np.r_[-1e308, np.full(15, 1e308)], np.full(16, -1e-300)])
def test_constant_and_huge_scores(scores):
    draw_kept(photo(64, 64), np.array([3]), np.array([True]), scores, (4, 4), (0, 0, 64, 64))


def test_all_kept_shows_the_image_itself():
    image = photo(640, 640)
    page = draw_kept(image, np.arange(16), np.zeros(16, bool), np.zeros(16), (4, 4), (0, 0, 640, 640))
    np.testing.assert_array_equal(left_panel(page, 640), np.asarray(image))
    assert list(picture._legend(16, 0, 16, True)) == []


def test_legend_counts():
    texts = [text for text, _, _ in picture._legend(64, 32, 576, False)]
    assert texts == ["32 top-scored", "32 representative", "512 dropped of 576", "not seen by the model"]
    assert [text for text, _, _ in picture._legend(1, 1, 1600, True)] == [
        "1 top-scored",
        "1,599 dropped of 1,600",
    ]


@pytest.mark.parametrize(
    ("kept", "is_top", "scores"),
    [([16], [True], 16), ([-1], [True], 16), ([1, 2], [True], 16), ([[1]], [[True]], 16), ([1], [True], 15)],
)
def test_arrays_that_do_not_fit_are_refused(kept, is_top, scores):
    with pytest.raises(ValueError, match="expected"):
        draw_kept(photo(8, 8), np.array(kept), np.array(is_top), np.ones(scores), (4, 4), (0, 0, 8, 8))


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=400), st.integers(1, 5))
def test_wrapped_lines_fit(text, most):
    font = picture._font(24)
    lines = picture._wrap(text, font, 300, most)
    assert len(lines) <= most
    assert all(font.getlength(line.removesuffix(" ...")) <= 300 or len(line) == 1 for line in lines)
    if not lines or not lines[-1].endswith("..."):
        assert "".join("".join(lines).split()) == "".join(text.split())


def test_long_texts_end_in_dots():
    box = (0, 0, 64, 64)
    args = photo(64, 64), np.array([3]), np.array([True]), np.ones(16), (4, 4), box
    short, long = draw_kept(*args), draw_kept(*args, title="word " * 5000, answer="x" * 100_000)
    assert short.height < long.height < 2500
