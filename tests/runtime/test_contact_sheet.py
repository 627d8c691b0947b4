"""The picture of what was kept of a video: a sheet of its frames."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_picture import selection as of_image

from flashvlm import contact_sheet
from flashvlm.cli.show import _names, save_pictures
from flashvlm.contact_sheet import GAP, HEIGHT, LABEL, WIDTH, draw_sheet, frame_labels
from flashvlm.encoder import Selection
from flashvlm.frames import Clip
from flashvlm.kept_picture import MARGIN, PANELS_Y
from flashvlm.patches import TOP
from flashvlm.preprocess import grid_of
from flashvlm.prompt import arrange
from flashvlm.tilings import Frames
from flashvlm.videos import load_video
from flashvlm.visual import VisualSpec

RED = (200, 0, 0)
SIZE = (160, 90)
CELLS = 12  # of a frame, 3 x 4


def selection(
    frames: int, kept: list[int], size: tuple[int, int] = SIZE, together: int = 1, newline: bool = False
) -> Selection:
    """Of frames of ``size`` (width, height); kept: None for all tokens."""
    pixels = Frames(resize="exact", size=(24, 32), count=64, repeat_time=together, mean=(0, 0, 0), std=(1, 1, 1))
    spec = VisualSpec(
        modality="video", graph="vision-video", placeholder_id=0, tokens_per_unit=CELLS, grid=(3, 4),
        candidates=pixels.max_units * CELLS + newline, feature_size=1, pixels=pixels,
        newline="end" if newline else "none",
    )  # fmt: skip
    clip = Clip(tuple(range(0, 10 * frames, 10)), 10 * frames, 25.0, together)
    grid = grid_of(size[::-1], pixels, clip)
    count = arrange(spec, grid).count
    indices = np.arange(count) if kept == [-1] else np.array(kept, dtype=np.int64)
    return Selection(indices, np.ones(len(indices), bool), np.zeros(count), count, spec, grid)


def shown(page: Image.Image, count: int, size: tuple[int, int] = SIZE, together: int = 1) -> Iterator[np.ndarray]:
    """Each frame of a sheet."""
    columns, width, height = contact_sheet._grid(count, size[1] / size[0], together)
    pixels = np.asarray(page)
    for number in range(count):
        row, column = divmod(number, columns)
        x, y = MARGIN + column * (width + GAP), PANELS_Y + row * (height + LABEL + GAP) + LABEL
        yield pixels[y : y + height, x : x + width]


@pytest.mark.parametrize("together", [1, 2])
def test_each_frame_shows_its_own(together: int) -> None:
    frames = [Image.new("RGB", SIZE, RED)] * 5
    kept = [5, CELLS * 2 + 7]  # of unit 0 and of unit 2
    page = draw_sheet(frames, selection(5, kept, together=together), "Q?", "A.", "flashvlm")
    for number, pixels in enumerate(shown(page, 5, together=together)):
        cells = [token % CELLS for token in kept if token // CELLS == number // together]
        lit = (pixels == RED).all(-1)
        assert lit.any() == (pixels == TOP).all(-1).any() == bool(cells)
        if cells:
            (cell,) = cells
            y, x = np.nonzero(lit)
            centre = (x.mean() / pixels.shape[1], y.mean() / pixels.shape[0])
            assert np.abs(np.array(centre) - ((cell % 4 + 0.5) / 4, (cell // 4 + 0.5) / 3)).max() < 0.01
            assert lit.mean() == pytest.approx(1 / CELLS, rel=0.15)


def test_all_kept_shows_the_frames() -> None:
    frames = [Image.new("RGB", SIZE, (value, 9, 9)) for value in (10, 100, 200)]
    page = draw_sheet(frames, selection(3, [-1], newline=True))
    for frame, pixels in zip(frames, shown(page, 3), strict=True):
        assert (pixels == np.asarray(frame)[0, 0]).all()


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("size", [(160, 90), (90, 160), (100, 100), (400, 100), (20, 300)])
@pytest.mark.parametrize("count", [1, 2, 7, 32, 64])
def test_any_number_of_frames_fits(count: int, size: tuple[int, int], together: int) -> None:
    columns, width, height = contact_sheet._grid(count, size[1] / size[0], together)
    assert columns * width + (columns - 1) * GAP <= WIDTH
    assert columns % together == 0
    if count < 30 and size != (20, 300):
        assert -(-count // columns) * (height + LABEL + GAP) <= HEIGHT


def test_a_sheet_of_many() -> None:
    page = draw_sheet([Image.new("RGB", (100, 160), RED)] * 64, selection(64, [0], (100, 160)), "Q?", "A.")
    assert page.width == WIDTH + 2 * MARGIN
    assert page.height < 3000


def test_labels_are_numbers_and_times() -> None:
    clip = Clip((0, 46, 1499, 90_000), 100_000, 25.0)
    assert frame_labels(clip) == ["0 at 0:00.0", "46 at 0:01.8", "1,499 at 1:00.0", "90,000 at 60:00.0"]


def test_frames_that_do_not_fit_are_refused() -> None:
    for count in (0, 2, 4):
        with pytest.raises(ValueError, match=f"expected 3 frames, found {count}"):
            draw_sheet([Image.new("RGB", SIZE)] * count, selection(3, [1]))


def test_show_draws_images_and_videos(tmp_path: Path) -> None:
    frames = np.zeros((3, 90, 160, 3), np.uint8)
    image = Image.new("RGB", (40, 30))
    selections = (of_image((40, 30), [1], [True], np.zeros(16)), selection(3, [1]))
    answer: Any = SimpleNamespace(text="A.", selections=selections)
    method = SimpleNamespace(method="flashvlm", score="log")
    pipeline: Any = SimpleNamespace(bundle=SimpleNamespace(manifest=SimpleNamespace(selection=method)))
    save_pictures(pipeline, [image, load_video(frames)], "Q?", answer, tmp_path / "kept.png")
    widths = {path.name: Image.open(path).width for path in tmp_path.iterdir()}
    assert widths == {"kept.png": 1240, "kept-2.png": WIDTH + 2 * MARGIN}


def test_names_in_headings() -> None:
    assert _names([False]) == _names([True]) == [""]
    assert _names([False, False, True]) == ["Image 1 of 2", "Image 2 of 2", "Video"]
