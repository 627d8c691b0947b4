"""Pixels equal those of transformers' PIL image processors: one crop, and every tiling."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from flashvlm.images import load_image
from flashvlm.preprocess import grid_of, seen_box, tile
from flashvlm.tilings import AnyRes, GridTiles, LongestEdge, Pixels, Single

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = Single(resize="shortest_edge", size=(336, 336), crop=(336, 336), mean=MEAN, std=STD)
SIDE = 28
ANYRES = AnyRes(side=SIDE, pinpoints=((28, 56), (56, 28), (56, 56), (28, 84), (84, 28)), mean=MEAN, std=STD)
GRID = GridTiles(side=SIDE, min_tiles=1, max_tiles=6, mean=MEAN, std=STD)
LONGEST = LongestEdge(side=SIDE, edge=90, resample="lanczos", mean=MEAN, std=STD)
SIZES = st.tuples(st.integers(2, 260), st.integers(2, 260)).filter(lambda size: max(size) <= 50 * min(size))


def noise(height: int, width: int, channels: int = 3) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8))


def clip(edge: int, crop: tuple[int, int], **more: Any) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": crop[0], "width": crop[1]}
    return CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=size, **more)


@pytest.mark.parametrize(
    "size",
    [(1, 1), (3, 500), (500, 3), (37, 411), (336, 336), (335, 337), (672, 336), (1, 150), (2, 1), (1001, 999)],
)
def test_one_crop_equals_clip(size: tuple[int, int]) -> None:
    image = noise(size[1], size[0])
    got, grid = tile(image, CLIP)
    assert (got.dtype, got.shape, grid.units) == (np.float32, (1, 3, 336, 336), 1)
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, clip(336, (336, 336))(image, return_tensors="np")["pixel_values"])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(4, 40), st.sampled_from(["nearest", "bilinear", "lanczos"]))
def test_one_crop_equals_clip_everywhere(width: int, height: int, edge: int, resample: str) -> None:
    crop = (edge, max(1, edge - 3))
    reference = clip(edge, crop, resample=PIL.Image.Resampling[resample.upper()])
    pixels = CLIP.model_copy(update={"size": (edge, edge), "crop": crop, "resample": resample})
    image = noise(height, width)
    np.testing.assert_array_equal(tile(image, pixels)[0], reference(image, return_tensors="np")["pixel_values"])


def test_exact_without_crop() -> None:
    pixels = CLIP.model_copy(update={"resize": "exact", "size": (48, 64), "crop": None})
    image = noise(100, 30)
    size = {"height": 48, "width": 64}
    want = clip(336, (336, 336))(image, size=size, do_center_crop=False, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(tile(image, pixels)[0], want)
    assert seen_box((100, 30), pixels) == (0, 0, 30, 100)
    twice = tile(image, pixels.model_copy(update={"repeat_time": 2}))[0]
    np.testing.assert_array_equal(twice, np.concatenate([want, want], axis=1))
    assert twice.shape[1:] == pixels.model_copy(update={"repeat_time": 2}).unit_shape


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_tiles_on_a_padded_canvas_equal_llava_next(size: tuple[int, int]) -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    reference = LlavaNextImageProcessorPil(
        image_grid_pinpoints=[list(pinpoint) for pinpoint in ANYRES.pinpoints],
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
    )
    got, grid = tile(noise(*size), ANYRES)
    want = reference(noise(*size), return_tensors="np")["pixel_values"][0]
    assert len(got) == grid.units <= ANYRES.max_units
    np.testing.assert_array_equal(got, want[: len(got)])
    assert not want[len(got) :].any()


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_a_grid_of_tiles_equals_internvl(size: tuple[int, int]) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    reference = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    got, grid = tile(noise(*size), GRID)
    assert len(got) == grid.units <= GRID.max_units
    np.testing.assert_array_equal(got, reference(noise(*size), return_tensors="np")["pixel_values"])


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_images_among_several_equal_llava_onevision(size: tuple[int, int]) -> None:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    reference = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=[*map(list, ANYRES.pinpoints)], image_mean=MEAN,
        image_std=STD,
    )  # fmt: skip
    pixels = ANYRES.model_copy(update={"border": tuple(int(255 * mean) for mean in MEAN)})
    alone, grid = tile(noise(*size), pixels)
    assert not grid.square
    np.testing.assert_array_equal(alone, reference([[noise(*size)]], return_tensors="np")["pixel_values"][0])
    got, grid = tile(noise(*size), pixels, several=True)
    assert grid == grid_of(size, pixels, several=True)
    assert (grid.units, grid.square) == (1, True)
    np.testing.assert_array_equal(got, reference([[noise(*size)] * 2], return_tensors="np")["pixel_values"][1])
    assert tile(noise(*size), ANYRES, several=True)[1] == tile(noise(*size), ANYRES)[1]


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_tiles_along_the_longest_edge_equal_smolvlm(size: tuple[int, int]) -> None:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    reference = SmolVLMImageProcessorPil(
        size={"longest_edge": 90}, max_image_size={"longest_edge": SIDE}, image_mean=MEAN, image_std=STD
    )
    got, grid = tile(noise(*size), LONGEST)
    assert len(got) == grid.units <= LONGEST.max_units
    np.testing.assert_array_equal(got, reference(noise(*size), return_tensors="np")["pixel_values"][0])


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 60), st.integers(20, 300))
def test_no_image_has_more_tiles_than_there_may_be(size: tuple[int, int], side: int, edge: int) -> None:
    pixels = LongestEdge(side=side, edge=edge, mean=MEAN, std=STD)
    assert grid_of(size, pixels).units <= pixels.max_units


def test_the_longest_edge_of_one_tile_is_the_whole_image() -> None:
    pixels = LongestEdge(side=SIDE, edge=SIDE, mean=MEAN, std=STD)
    assert (pixels.max_units, pixels.may_have_thumbnail) == (1, False)
    assert grid_of((40, 50), pixels).units == 1


def test_modes_become_rgb() -> None:
    image = noise(40, 50, 4)
    np.testing.assert_array_equal(tile(image, CLIP)[0], tile(load_image(image), CLIP)[0])


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((336, 672), (168, 0, 504, 336)),
        ((336, 336), (0, 0, 336, 336)),
        ((300, 100), (0, 100, 100, 200)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_seen_box(size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert seen_box(size, CLIP) == pytest.approx(box)


def test_the_seen_box_is_what_the_model_sees() -> None:
    # Paint the box black on white: the model sees black only.
    image = np.full((90, 200, 3), 255, np.uint8)
    left, top, right, bottom = seen_box((90, 200), CLIP)
    image[round(top) : round(bottom), round(left) : round(right)] = 0
    pixels = CLIP.model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3, "resample": "nearest"})
    assert tile(PIL.Image.fromarray(image), pixels)[0].max() == 0


def test_the_seen_box_of_a_padded_canvas_lies_around_the_image() -> None:
    left, top, right, bottom = seen_box((100, 400), ANYRES)  # on a canvas of 28 x 84
    assert (left, right) == (0, 400)
    assert top < 0
    assert bottom > 100
    assert (right - left) / (bottom - top) == pytest.approx(84 / 28)
    assert grid_of((100, 400), ANYRES)[:3] == (1, 3, "first")


@pytest.mark.parametrize(
    ("pixels", "change"),
    [
        (CLIP, {"size": (336, 224)}),
        (CLIP, {"crop": (337, 336)}),
        (CLIP, {"crop": None}),
        (CLIP, {"size": (0, 0)}),
        (CLIP, {"crop": (0, 5)}),
        (CLIP, {"std": (0.0, 1.0, 1.0)}),
        (CLIP, {"rescale": 0.0}),
        (CLIP, {"resample": "cubic"}),
        (CLIP, {"colour": 1}),
        (CLIP, {"tiling": "mosaic"}),
        (CLIP, {"repeat_time": 3}),
        (ANYRES, {"pinpoints": ((28, 50),)}),
        (ANYRES, {"pinpoints": ()}),
        (GRID, {"min_tiles": 7}),
        (GRID, {"max_tiles": 1000}),
        (LONGEST, {"side": 0}),
    ],
)
def test_bad_settings_are_refused(pixels: Any, change: dict[str, Any]) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Pixels)
    with pytest.raises(ValidationError):
        adapter.validate_python({**pixels.model_dump(), **change})
    assert adapter.validate_json(pixels.model_dump_json()) == pixels
