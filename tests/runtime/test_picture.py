import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flashvlm import drawing
from flashvlm.drawing import Scale, in_font, shorten, wrap
from flashvlm.encoder import Selection
from flashvlm.kept_picture import MARGIN, PANEL, PANELS_Y, draw_kept, heading, legend_of
from flashvlm.patches import REPRESENTATIVE, TOP
from flashvlm.preprocess import Single, grid_of
from flashvlm.visual import VisualSpec


def photo(width, height, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


def selection(size, kept, is_top, scores, grid=(4, 4), square=None):
    """Of an image of ``size`` (width, height): seen whole, or its centre, resized to a ``square`` of pixels."""
    how = {"resize": "exact", "size": (64, 64)}
    if square is not None:
        how = {"resize": "shortest_edge", "size": (square, square), "crop": (square, square)}
    pixels = Single(**how, mean=(0, 0, 0), std=(1, 1, 1))
    count = grid[0] * grid[1]
    spec = VisualSpec(
        graph="vision", placeholder_id=0, tokens_per_unit=count, grid=grid, candidates=count, feature_size=1,
        pixels=pixels,
    )  # fmt: skip
    arrays = np.array(kept, dtype=np.int64), np.array(is_top, dtype=bool), np.asarray(scores)
    return Selection(*arrays, count, spec, grid_of(size[::-1], pixels))


def draw(image, kept, is_top, scores, grid=(4, 4), square=None, **texts):
    return draw_kept(image, selection(image.size, kept, is_top, scores, grid, square), **texts)


def panel(page, number, height):
    """0 is the image, 1 what was kept, 2 the scores."""
    x = MARGIN + number * (PANEL + MARGIN)
    return np.asarray(page)[PANELS_Y : PANELS_Y + height, x : x + PANEL]


def panels(page):
    return (page.width - MARGIN) // (PANEL + MARGIN)


SIZES = [(1, 1), (3, 500), (640, 427), (20_000, 100), (100, 20_000)]
GRIDS = [(1, 1), (4, 4), (5, 5), (3, 70)]


@pytest.mark.parametrize(("size", "grid"), [(s, (24, 24)) for s in SIZES] + [((300, 200), g) for g in GRIDS])
def test_any_size_and_grid(size, grid):
    count = grid[0] * grid[1]
    kept = np.unique([0, count // 2, count - 1])
    texts = {"question": "Q?", "answer": "A.", "method": "flashvlm"}
    page = draw(photo(*size), kept, kept == 0, np.arange(count), grid, square=20, **texts)
    assert page.mode == "RGB"
    assert panels(page) == (2 if count == 1 else 3)
    assert page.height < 1600
    # Thin images show the crop large enough for outlines of both colours.
    colours = {tuple(c) for c in panel(page, 1, page.height - PANELS_Y).reshape(-1, 3)}
    assert count == 1 or {TOP, REPRESENTATIVE} <= colours


def test_kept_patches_are_clear_and_dropped_ones_are_not():
    # A white image with one red patch, number 6 of a 4 x 4 grid over the central square.
    pixels = np.full((140, 280, 3), 255, np.uint8)
    pixels[35:70, 70 + 70 : 70 + 105] = (200, 0, 0)
    page = draw(Image.fromarray(pixels), [6], [True], np.arange(16.0), square=140)
    shown = panel(page, 1, 280)
    clear = (shown == (200, 0, 0)).all(-1)
    assert clear[76:134, 286:344].all()  # all but the outline of 4 pixels and the blur of resizing
    assert not clear[:70].any()
    assert not clear[:, 350:].any()
    assert (shown[[70, 139], 310] == TOP).all()
    dropped = shown[100, 200]
    assert len(set(dropped.tolist())) == 1
    assert dropped[0] < 128


@pytest.mark.parametrize("exposure", [0.08, 0.5, 1.0])
def test_dropped_patches_show_on_any_exposure(exposure):
    """Gray that differs from what is kept, with the image's own structure in it."""
    pixels = np.full((80, 80), 40.0)
    pixels[:, 20::40] = 90  # a line in each patch
    pixels = (pixels * 2 * exposure).astype(np.uint8)
    image = Image.fromarray(pixels).convert("RGB").resize((560, 560), Image.Resampling.NEAREST)
    page = draw(image, [0], [True], np.zeros(4), (2, 2))
    shown = panel(page, 1, 560).astype(int)
    kept, dropped = shown[100, 100], shown[400, 400]
    assert (kept == np.asarray(image)[100, 100]).all()
    assert abs(int(kept[0]) - int(dropped[0])) >= (20 if exposure != 0.5 else 0)
    assert shown[400, 280 + 145][0] - dropped[0] > 25  # the line


def test_the_image_itself_is_at_hand():
    image = photo(560, 560)
    page = draw(image, [3], [True], np.arange(16))
    np.testing.assert_array_equal(panel(page, 0, 560), np.asarray(image))


def test_scores_rise_from_dark_to_bright_and_gaps_stay_gray():
    gray = Image.new("RGB", (64, 64), (128, 128, 128))
    scores = np.linspace(-6, 0, 16)
    scores[5] = -np.inf
    scores[6] = np.nan
    page = draw(gray, [15], [True], scores)
    centres = panel(page, 2, 560)[70::140, 70::140].reshape(16, 3).astype(int)
    light = centres @ [0.2126, 0.7152, 0.0722]
    finite = np.isfinite(scores)
    assert (np.diff(light[finite]) > 0).all()
    assert (np.ptp(centres[~finite], axis=1) == 0).all()


def test_one_outlier_does_not_take_all_colours():
    scores = np.r_[np.linspace(-2, -1, 99), -1000.0]
    scale = Scale.of(scores)
    assert (scale.below, scale.above) == (True, True)
    assert -2.1 < scale.low < -1.9
    level = scale.level(scores)
    assert np.ptp(level[:99]) == 1
    assert level[99] == 0
    # Nearly all the same: what differs is not cut off.
    assert Scale.of(np.r_[np.zeros(99), 5.0]) == Scale(0, 5, False, False)


@pytest.mark.parametrize("scores", [np.zeros(16), np.zeros(0), np.full(16, np.nan)])
def test_without_a_score_there_is_no_panel_for_it(scores):
    red = Image.new("RGB", (64, 64), (200, 30, 30))
    page = draw(red, [3], [False], scores, method="uniform")
    assert panels(page) == 2


@pytest.mark.parametrize("scores", [np.full(16, 0.25), np.r_[-1e308, np.full(15, 1e308)], np.full(16, -1e-300)])
def test_constant_and_huge_scores(scores):
    page = draw(photo(64, 64), [3], [True], scores)
    assert panels(page) == 3


def test_all_kept_shows_the_image_itself():
    image = photo(560, 560)
    page = draw(image, np.arange(16), np.ones(16, bool), np.zeros(16))
    assert panels(page) == 2
    np.testing.assert_array_equal(panel(page, 1, 560), np.asarray(image))
    whole = selection((8, 8), np.arange(16), np.zeros(16, bool), np.zeros(16))
    assert list(legend_of(np.arange(16), whole)) == []


@pytest.mark.parametrize(
    ("kept", "count", "expected"),
    [
        (64, 576, "flashvlm keeps 64 of 576 visual tokens, 89 % fewer"),
        (2000, 2001, "flashvlm keeps 2,000 of 2,001 visual tokens, less than 1 % fewer"),
        (1, 576, "flashvlm keeps 1 of 576 visual tokens, more than 99 % fewer"),
        (576, 576, "All 576 visual tokens, nothing selected"),
    ],
)
def test_heading(kept, count, expected):
    some = selection((8, 8), np.arange(kept), np.ones(kept, bool), np.zeros(count), (1, count))
    assert heading(some, "flashvlm") == expected
    assert heading(some, "flashvlm", "Image 2 of 3") == f"Image 2 of 3: {expected[0].lower()}{expected[1:]}"


def test_what_a_score_is_stands_below_it():
    """The same scores take a line more where it is known what they are."""
    args = photo(64, 64), [3], [True], np.linspace(-6, 0, 16)
    heights = [draw(*args, score=score).height for score in ("log", "cosine", None)]
    assert heights[0] == heights[1] == heights[2] + 26


def test_legend_counts():
    for grid, kept, top, expected in (
        ((24, 24), 64, 32, ["32 top-scored", "32 representative", "512 dropped"]),
        ((40, 40), 1, 1, ["1 top-scored", "1,599 dropped"]),
    ):
        some = selection((8, 8), np.arange(kept), np.arange(kept) < top, [], grid)
        assert [entry.text for entry in legend_of(np.arange(some.count), some)] == expected


@pytest.mark.parametrize(
    ("kept", "is_top", "scores"),
    [([16], [True], 16), ([-1], [True], 16), ([1, 2], [True], 16), ([[1]], [[True]], 16), ([1], [True], 15)],
)
def test_arrays_that_do_not_fit_are_refused(kept, is_top, scores):
    with pytest.raises(ValueError, match="expected"):
        draw(photo(8, 8), kept, is_top, np.ones(scores))


# --- text ---


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=400), st.integers(1, 5))
def test_wrapped_lines_fit(words, most):
    text = in_font(words, 24)
    lines = wrap(text, 300, most)
    assert len(lines) <= most
    assert all(text.width(line.removesuffix(" ...")) <= 300 or len(line) == 1 for line in lines)
    if not lines or not lines[-1].endswith("..."):
        assert "".join("".join(lines).split()) == "".join(text.words.split())


def test_long_texts_end_in_dots():
    args = photo(64, 64), [3], [True], np.ones(16)
    short, long = draw(*args), draw(*args, question="word " * 5000, answer="x" * 100_000)
    assert short.height < long.height < 2500
    text = in_font("a long name " * 50, 31)
    assert shorten(text, 400).endswith("...")
    assert text.width(shorten(text, 400)) <= 400
    assert shorten(in_font("short", 31), 400) == "short"


def test_scripts_that_our_font_lacks_are_drawn_by_a_font_of_the_system():
    if not any("DejaVuSans" in path for path in drawing._system_fonts()):
        pytest.skip("no DejaVu on this machine")
    text = in_font("Какого цвета сердце?", 24)
    assert text.words == "Какого цвета сердце?"
    assert "DejaVu" in text.font.path
    assert in_font("What is more than 5?", 24).font is drawing.plain_font(24)


def test_nothing_is_drawn_as_boxes(monkeypatch):
    """Where no font has a character, its escape says which it was, and a text of such characters is not drawn."""
    monkeypatch.setattr(drawing, "_system_fonts", lambda: ())
    assert in_font("color: цвет of the heart", 24).words == r"color: \u0446\u0432\u0435\u0442 of the heart"
    assert in_font("tab\x07bell and words", 24).words == r"tab\x07bell and words"
    assert in_font("图中的心形", 24).words == "(text that no font on this machine can draw)"
    assert in_font("", 24).words == ""
    assert in_font("line\nbreak", 24).words == "line\nbreak"
