"""Frames of a video: which are chosen, their pixels, the text around them and their positions, as transformers has
them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pydantic import ValidationError

from flashvlm.errors import VideoError
from flashvlm.frames import Clip, choose_frames, clip_of
from flashvlm.preprocess import grid_of, stack, tile
from flashvlm.prompt import Item, arrange, expand, layout, run_lengths
from flashvlm.text.numbers import in_words
from flashvlm.tilings import Frames, LongestEdge, Single
from flashvlm.visual import TextLayout, VisualSpec

NORMAL: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}
VIDEO = 99
RATES = (1.0, 5.5, 23.976, 25.0, 30.0, 60.0)
TOTALS = (*range(1, 70), *range(70, 1800, 53))


def frames(count: int, **more: Any) -> Frames:
    return Frames(**{"resize": "exact", "size": (8, 12), "count": count, **NORMAL, **more})


def spec(pixels: Frames, **more: Any) -> VisualSpec:
    cells = 6 + (more.get("skip") == "cls")
    candidates = pixels.max_units * cells + (more.get("newline") == "end")
    fixed = {"modality": "video", "graph": "vision-video", "placeholder_id": VIDEO, "feature_size": 8, "grid": (2, 3)}
    return VisualSpec(pixels=pixels, tokens_per_unit=cells, candidates=candidates, **(fixed | more))


def item(of: VisualSpec, clip: Clip, kept: list[int] | None = None) -> Item:
    grid = grid_of((8, 12), of.pixels, clip)
    count = arrange(of, grid).count
    return Item(of, grid, count, np.arange(count) if kept is None else np.array(kept))


def metadata(total: int, fps: float) -> Any:
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps)


# --- which -----------------------------------------------------------------------------------------------------------


def test_the_start_of_each_part_equals_transformers_default() -> None:
    from transformers.video_utils import default_sample_indices_fn

    for total in TOTALS:
        for count in {1, 2, 7, 8, 32} & {*range(total + 1)}:
            want = default_sample_indices_fn(metadata(total, 25.0), num_frames=count)
            assert choose_frames(total, 25.0, frames(count)) == (*want.tolist(),)
        for fps in RATES if total < 1024 else ():
            want = default_sample_indices_fn(metadata(total, fps), fps=1)
            assert choose_frames(total, fps, frames(1024, fps=1.0)) == (*want.tolist(),)


def test_the_middle_of_each_part_equals_internvl() -> None:
    """``sample_frames`` of video_processing_internvl, which needs torchvision to import, word for word."""
    torch = pytest.importorskip("torch")
    for total in TOTALS:
        for count in {1, 2, 7, 8, 32} & {*range(total + 1)}:
            want = torch.arange(total / count / 2, total, total / count).int()
            assert choose_frames(total, 25.0, frames(count, rule="middle")) == (*want.tolist(),)


def test_pairs_equal_qwen2_5() -> None:
    """``sample_frames`` of video_processing_qwen2_vl, which needs torchvision to import, word for word."""
    torch = pytest.importorskip("torch")
    longer = 0
    for total in TOTALS[1:]:
        for fps in RATES:
            most = math.floor(min(48, total) / 2) * 2
            number = min(max(total / fps * 2.0, 4), most, total)
            number = math.floor(number / 2) * 2
            want = torch.arange(0, total, total / number).int().tolist()
            if len(want) > number:  # float32: an index that is not there, and an IndexError
                assert want.pop() == total
                longer += 1
            assert choose_frames(total, fps, frames(48, fps=2.0, min_frames=4, multiple=2)) == (*want,)
    assert longer < 20


def test_from_end_to_end_equals_qwen3() -> None:
    pytest.importorskip("torch")
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    processor = SimpleNamespace(fps=2, min_frames=4, max_frames=48)
    for total in TOTALS:
        for fps in RATES:
            want = Qwen3VLVideoProcessor.sample_frames(processor, metadata(total, fps))
            assert choose_frames(total, fps, frames(48, rule="ends", fps=2.0, min_frames=4)) == (*want.tolist(),)


@pytest.mark.parametrize(("count", "rate"), [(64, 1.0), (8, 2.0), (4, 0.3)])
def test_inside_equals_smolvlm(count: int, rate: float) -> None:
    pytest.importorskip("torch")
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    processor = SimpleNamespace(num_frames=count, fps=rate)
    for total in (*TOTALS, 5000, 20_000):
        for fps in RATES:
            want = SmolVLMVideoProcessor.sample_frames(processor, metadata(total, fps))
            assert choose_frames(total, fps, frames(count, rule="inside", fps=rate)) == (*want.tolist(),)


def test_frames_of_an_unknown_rate_are_those_the_bundle_samples() -> None:
    assert clip_of(7, None, frames(8, fps=2.0, multiple=2)) == Clip((0, 1, 2, 3, 4, 5), 7, 2.0)
    assert clip_of(6, None, frames(8, fps=2.0)) == Clip((*range(6),), 6, 2.0)
    assert clip_of(6, None, frames(3)) == Clip((0, 2, 4), 6, 24.0)
    assert clip_of(3, 1.0, frames(8, repeat_time=2)).units == 2


def test_a_short_video_has_what_there_is_or_is_refused() -> None:
    assert choose_frames(3, 25.0, frames(8)) == (0, 1, 2)
    assert choose_frames(3, 25.0, frames(8, fps=50.0, min_frames=8)) == (0, 1, 2)
    with pytest.raises(VideoError, match="at least 8 frames, found 3; take a longer one"):
        choose_frames(3, 25.0, frames(8, min_frames=8))
    with pytest.raises(VideoError, match="at least 2 frames, found 1"):
        choose_frames(1, 25.0, frames(8, fps=2.0, multiple=2))
    with pytest.raises(VideoError, match="at least 1 frames, found 0"):
        choose_frames(0, 25.0, frames(8))


@pytest.mark.parametrize("total", [1, 10**9])
@pytest.mark.parametrize("fps", [1e-300, 1e300])
@pytest.mark.parametrize("rule", ["start", "middle", "ends", "inside"])
def test_no_number_asks_for_more_than_there_may_be(total: int, fps: float, rule: str) -> None:
    found = choose_frames(total, fps, frames(8, rule=rule, fps=1.0))
    assert 1 <= len(found) <= min(8, total)
    assert found == (*sorted({*found}),)
    assert 0 <= found[0] <= found[-1] < total


# --- pixels ----------------------------------------------------------------------------------------------------------


def noise(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (31, 47, 3), dtype=np.uint8))


def test_each_frame_is_an_image() -> None:
    crop: dict[str, Any] = {"resize": "shortest_edge", "size": (20, 20), "crop": (18, 16)}
    for how in (crop, {"size": (8, 12)}):
        got = stack([noise(i) for i in range(3)], frames(4, **how))
        single = Single(**{"resize": "exact", **NORMAL, **how})
        np.testing.assert_array_equal(got, np.concatenate([tile(noise(i), single)[0] for i in range(3)]))


def test_pairs_stand_behind_one_another_and_the_last_again() -> None:
    one = [tile(noise(i), Single(resize="exact", size=(8, 12), **NORMAL))[0][0] for i in range(3)]
    pixels = frames(4, repeat_time=2)
    got = stack([noise(i) for i in range(3)], pixels)
    assert got.shape == (2, *pixels.unit_shape) == (2, 6, 8, 12)
    np.testing.assert_array_equal(got, [np.concatenate(one[:2]), np.concatenate([one[2], one[2]])])
    assert got.flags.c_contiguous


def test_by_the_longer_edge_first_equals_an_image_of_one_tile() -> None:
    want = tile(noise(0), LongestEdge(side=20, edge=20, resample="lanczos", **NORMAL))[0]
    got = stack([noise(0)], frames(1, resize="longest_edge", size=(20, 20), resample="lanczos"))
    np.testing.assert_array_equal(got, want)


# --- order, text and positions ---------------------------------------------------------------------------------------


def test_fewer_frames_than_there_may_be_are_padded_behind() -> None:
    found = arrange(spec(frames(4)), grid_of((8, 12), frames(4), Clip((0, 5), 9, 1.0)))
    assert found.count == 12
    assert found.order.tolist() == [*range(1, 13), *[0] * 12]
    assert found.valid.tolist() == [True] * 12 + [False] * 12


def test_one_newline_behind_all_frames() -> None:
    found = arrange(spec(frames(3), newline="end"), grid_of((8, 12), frames(3), Clip((0, 5), 9, 1.0)))
    assert found.count == 13
    assert found.order.tolist() == [*range(1, 13), 0, *[0] * 6]
    assert np.flatnonzero(found.valid).tolist() == [*range(12)]


def test_cls_of_each_frame_is_never_selected() -> None:
    found = arrange(spec(frames(3), skip="cls"), grid_of((8, 12), frames(3), Clip((0, 5), 9, 1.0)))
    assert (found.count, len(found.order)) == (14, 21)
    assert np.flatnonzero(~found.valid[:14]).tolist() == [0, 7]


INTERN = TextLayout(frame="Frame{i}: <img>{v}</img>", join="\n")
SMOL = TextLayout(
    head="You are provided the following series of {words} frames from a {hms} [H:MM:SS] video.\n",
    frame="\nFrame from {mmss}:<f><global-img>{v}<f>",
    end="\n\n",
)
QWEN = TextLayout(frame="<{seconds} seconds><|s|>{v}<|e|>")


def test_the_text_around_frames() -> None:
    clip = Clip((0, 40, 1900), 2000, 25.0)
    assert expand(spec(frames(3), text=INTERN), grid_of((8, 12), frames(3), clip)) == (
        "Frame1: <img>{v}</img>\nFrame2: <img>{v}</img>\nFrame3: <img>{v}</img>"
    )
    assert expand(spec(frames(3), text=SMOL), grid_of((8, 12), frames(3), clip)) == (
        "You are provided the following series of three frames from a 0:01:20 [H:MM:SS] video.\n"
        "\nFrame from 00:00:<f><global-img>{v}<f>"
        "\nFrame from 00:01:<f><global-img>{v}<f>"
        "\nFrame from 01:16:<f><global-img>{v}<f>\n\n"
    )
    pairs = frames(4, repeat_time=2)
    assert expand(spec(pairs, text=QWEN), grid_of((8, 12), pairs, clip._replace(together=2))) == (
        "<0.8 seconds><|s|>{v}<|e|><76.0 seconds><|s|>{v}<|e|>"
    )
    one = spec(frames(3), text=TextLayout(whole="<a>{v}<b>", head="{n} "))
    assert expand(one, grid_of((8, 12), frames(3), clip)) == "3 <a>{v}<b>"


def test_runs_of_frames() -> None:
    clip = Clip((0, 1, 2), 3, 1.0)
    apart, whole = spec(frames(4), text=INTERN), spec(frames(4), newline="end")
    assert run_lengths(item(apart, clip)) == [6, 6, 6]
    assert run_lengths(item(apart, clip._replace(indices=(0,)))) == [6]
    assert run_lengths(item(whole, clip)) == [19]
    prompt = layout(np.array([VIDEO, 1, VIDEO, 2, VIDEO]), [item(apart, clip, [0, 7, 8])], 1, True)
    assert prompt.position_ids.tolist() == [[0, 6, 8, 9, 13]]
    assert prompt.next_position == 20


def rope_index(ids: list[int], images: list[Any], videos: list[Any], seconds: list[float]) -> Any:
    """Of transformers' Qwen2.5-VL; grids in merged tokens [t,h,w], images are id 98."""
    torch = pytest.importorskip("torch")
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=4))
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids.__get__(model)
    tokens = torch.tensor([ids])
    doubled = [torch.tensor([[t, 2 * h, 2 * w] for t, h, w in grids]) if grids else None for grids in (images, videos)]
    kinds = (tokens == 98).int() + 2 * (tokens == VIDEO).int()
    asked = {"second_per_grid_ts": torch.tensor(seconds), "attention_mask": torch.ones_like(tokens)}
    places, delta = Qwen2_5_VLModel.get_rope_index(model, tokens, kinds, *doubled, **asked)
    return places[:, 0].tolist(), int(delta) + len(ids)


@pytest.mark.parametrize("total", [2, 3, 8, 50, 333])
@pytest.mark.parametrize("fps", [0.5, 23.976, 25.0])
def test_positions_equal_qwen2_5(total: int, fps: float) -> None:
    """A video of its own rate, then an image: behind a long video, text has numbers that its frames have too."""
    pixels = frames(16, fps=2.0, multiple=2, repeat_time=2)
    video = spec(pixels, positions="mrope", time_scale=4)
    clip = clip_of(total, fps, pixels)
    still = Single(resize="exact", size=(8, 12), **NORMAL)
    image = VisualSpec(
        graph="vision", placeholder_id=98, tokens_per_unit=6, candidates=6, grid=(2, 3), feature_size=8, pixels=still
    ).model_copy(update={"positions": "mrope", "time_scale": 4})
    ids = [1, 2, *[VIDEO] * (6 * clip.units), 3, *[98] * 6, 4, 5]
    seconds = 2 / (len(clip.indices) / total * fps)
    want, following = rope_index(ids, [[1, 2, 3]], [[clip.units, 2, 3]], [seconds])
    items = [item(video, clip), Item(image, grid_of((8, 12), still), 6, np.arange(6))]
    prompt = layout(np.array([1, 2, VIDEO, 3, 98, 4, 5]), items, 3, True)
    assert prompt.position_ids.tolist() == want
    assert prompt.next_position == following
    kept = [0, 5, 6 * clip.units - 1]
    some = layout(np.array([1, 2, VIDEO, 3, 98, 4, 5]), [item(video, clip, kept), items[1]], 3, True)
    assert some.position_ids[:, :2].tolist() == prompt.position_ids[:, :2].tolist()
    assert some.position_ids[:, 2:5].tolist() == prompt.position_ids[:, 2 + np.array(kept)].tolist()
    assert some.next_position == following


def test_frames_in_runs_of_their_own_begin_at_no_time() -> None:
    """As get_rope_index of transformers' Qwen3-VL, where each pair of frames is a video of its own."""
    clip = Clip((0, 1, 2, 3), 40, 2.0, 2)
    pixels = frames(4, repeat_time=2)
    apart = spec(pixels, positions="mrope", time_scale=4, text=QWEN)
    want, following = rope_index([7, *[VIDEO] * 6, 8, *[VIDEO] * 6, 9], [], [[1, 2, 3]] * 2, [1.0, 1.0])
    prompt = layout(np.array([7, VIDEO, 8, VIDEO, 9]), [item(apart, clip)], 3, True)
    assert prompt.position_ids.tolist() == want
    assert prompt.next_position == following


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modality": "image"}, "modality image does not go with the tiling frames"),
        ({"candidates": 23}, "expected 24 candidates"),
        ({"text": {"tile": "{v}"}}, "text of tiles goes with images"),
        ({"text": {"frame": "none"}}, "expected one {v} for the visual tokens of a frame"),
        ({"text": {"head": "{v}"}}, "expected one {v}"),
        ({"newline": "end", "candidates": 25, "text": {"frame": "{v}"}}, "a newline at the end"),
        ({"marker": ""}, "at least 1 character"),
        ({"pixels": frames(1024, size=(512, 512)), "candidates": 6144}, "pixel values"),
    ],
)
def test_specs_that_do_not_add_up_are_refused(change: dict[str, Any], words: str) -> None:
    good = spec(frames(4)).model_dump()
    with pytest.raises(ValidationError, match=words):
        VisualSpec.model_validate(
            good | {name: getattr(v, "model_dump", lambda v=v: v)() for name, v in change.items()}
        )


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0},
        {"count": 1025},
        {"min_frames": 9},
        {"multiple": 3},
        {"fps": 0.0},
        {"fps": math.inf},
        {"rule": "inside"},
        {"rule": "first"},
        {"resize": "longest_edge"},
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any]) -> None:
    assert Frames.model_validate_json(frames(8).model_dump_json()) == frames(8)
    with pytest.raises(ValidationError):
        frames(8).model_validate({**frames(8).model_dump(), **change})


def test_numbers_in_words() -> None:
    assert [in_words(n) for n in (0, 8, 12, 20, 64, 100, 768, 1005, 1024, 2130)] == [
        *("zero", "eight", "twelve", "twenty", "sixty-four", "one hundred", "seven hundred and sixty-eight"),
        *("one thousand and five", "one thousand and twenty-four", "two thousand, one hundred and thirty"),
    ]
