"""Where visual tokens stand in a prompt: reading order, text around them, positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flashvlm.errors import PromptError
from flashvlm.preprocess import Grid, grid_of
from flashvlm.prompt import Item, Text, Visual, arrange, coordinates, expand, layout, run_lengths, select_rows
from flashvlm.tilings import AnyRes, Frames, GridTiles, LongestEdge, Single
from flashvlm.visual import TextLayout, VisualSpec

NORMAL: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
IMAGE = 99


def spec(pixels: Any, grid: tuple[int, int], candidates: int, **more: Any) -> VisualSpec:
    cells = grid[0] * grid[1] + (more.get("skip") == "cls")
    settings = {"graph": "vision", "placeholder_id": IMAGE, "tokens_per_unit": cells, "grid": grid, "feature_size": 8}
    return VisualSpec(pixels=pixels, candidates=candidates, **(settings | more))


def item(of: VisualSpec, grid: Grid, kept: list[int] | None = None) -> Item:
    count = arrange(of, grid).count
    return Item(of, grid, count, np.arange(count) if kept is None else np.array(kept))


PLAIN = spec(Single(resize="exact", size=(20, 30), **NORMAL), (2, 3), 6)
TILES = GridTiles(side=14, min_tiles=1, max_tiles=4, **NORMAL)
ROWS = TextLayout(whole="<g>{v}</g>", tile="<{r},{c}>{v}", row_end="\n", last="\n<g>{v}</g>")
TILED = spec(TILES, (2, 2), 20, text=ROWS)
ANYRES = spec(AnyRes(side=28, pinpoints=((28, 56), (56, 28), (56, 56)), **NORMAL), (4, 4), 88, order="anyres")


def test_without_tiles_tokens_stay_in_order() -> None:
    found = arrange(PLAIN, Grid(1, 1, "none", (20, 30)))
    assert found.order.tolist() == [1, 2, 3, 4, 5, 6]
    assert found.valid.all()
    assert found.count == 6


def test_fewer_tiles_than_there_may_be_are_padded_behind() -> None:
    found = arrange(TILED, Grid(1, 2, "last", (14, 28)))
    assert found.count == 12
    assert found.order.tolist() == [*range(1, 13), *[0] * 8]
    assert found.valid.tolist() == [True] * 12 + [False] * 8


def test_cls_is_never_selected() -> None:
    frames = spec(TILES, (2, 2), 25, skip="cls")
    found = arrange(frames, Grid(1, 2, "last", (14, 28)))
    assert found.count == 15
    assert np.flatnonzero(~found.valid[:15]).tolist() == [0, 5, 10]


def test_a_budget_for_each_unit() -> None:
    frames = spec(TILES, (2, 2), 25, skip="cls", scope="unit")
    grid = Grid(1, 2, "last", (14, 28))
    valid = select_rows(frames, grid, arrange(frames, grid).valid)
    assert valid.tolist() == [[False, True, True, True, True]] * 3  # no padding, and of each unit no CLS
    assert frames.select_size(14) == (5, 2)
    assert [frames.kept_of(15, 3, budget) for budget in (5, 14, 24, 25, "all")] == [3, 6, 12, 15, 15]
    one = Frames(resize="exact", size=(14, 14), count=1, **NORMAL)
    video = spec(one, (2, 2), 5, modality="video", newline="end", scope="unit")
    assert video.select_size(5) == (4, 4)  # never more than a unit has
    whole = spec(TILES, (2, 2), 20)
    assert select_rows(whole, grid, arrange(whole, grid).valid).shape == (1, 20)
    assert whole.select_size(14) == (20, 14)
    assert [whole.kept_of(12, 3, budget) for budget in (5, 14, "all")] == [5, 12, 12]


def test_a_budget_for_each_unit_wants_units_one_after_another() -> None:
    for pixels, grid, count, order in ((PLAIN.pixels, (2, 3), 6, "raster"), (ANYRES.pixels, (4, 4), 88, "anyres")):
        with pytest.raises(ValidationError, match=f"found the tiling {pixels.tiling}; use scope item"):
            spec(pixels, grid, count, order=order, scope="unit")


@settings(max_examples=80, deadline=None)
@given(st.tuples(st.integers(2, 300), st.integers(2, 300)).filter(lambda size: max(size) <= 20 * min(size)))
def test_rows_over_tiles_equal_llava_next(size: tuple[int, int]) -> None:
    """Against transformers' own packing of numbered tokens, with a newline of -1."""
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    pixels = ANYRES.pixels
    assert isinstance(pixels, AnyRes)
    grid = grid_of(size, pixels)
    units, n = grid.units, 16
    tokens = torch.arange(1, units * n + 1, dtype=torch.float32).reshape(units, n, 1)
    model = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(image_size=28, patch_size=7),
            image_grid_pinpoints=[list(pinpoint) for pinpoint in pixels.pinpoints],
        )
    )
    packed, _ = LlavaNextModel.pack_image_features(
        model, [tokens], [torch.tensor(size)], "default", image_newline=torch.tensor([-1.0])
    )
    want = packed[0].flatten().int().tolist()
    found = arrange(ANYRES, grid)
    assert [-1 if token == 0 else token for token in found.order[: found.count].tolist()] == want
    assert found.valid.tolist() == [*(token > 0 for token in want), *[False] * (88 - len(want))]


def test_an_image_among_several_has_one_newline() -> None:
    assert isinstance(ANYRES.pixels, AnyRes)
    bordered = spec(ANYRES.pixels.model_copy(update={"border": (0, 0, 0)}), (4, 4), 88, order="anyres")
    grid = grid_of((50, 90), bordered.pixels, several=True)
    found = arrange(bordered, grid)
    assert found.order.tolist() == [*range(1, 17), *[0] * 72]
    assert found.valid.tolist() == [True] * 16 + [False] * 72
    assert found.count == 17
    assert run_lengths(item(bordered, grid)) == [17]


def test_the_text_around_tiles() -> None:
    assert expand(PLAIN, Grid(1, 1, "none", (20, 30))) == "{v}"
    assert expand(TILED, Grid(1, 1, "none", (14, 14))) == "<g>{v}</g>"
    assert expand(TILED, Grid(2, 1, "last", (28, 14))) == "<1,1>{v}\n<2,1>{v}\n\n<g>{v}</g>"
    assert run_lengths(item(TILED, Grid(2, 1, "last", (28, 14)))) == [4, 4, 4]
    assert run_lengths(item(TILED, Grid(1, 1, "none", (14, 14)))) == [4]


def test_a_pattern_reaches_into_nothing() -> None:
    text = TextLayout(whole="{v}", tile="{r.__class__}{0}{v}", last="{v}")
    hostile = spec(TILES, (2, 2), 20, text=text)
    assert expand(hostile, Grid(1, 2, "none", (14, 28))) == "{r.__class__}{0}{v}" * 2


def test_text_alone() -> None:
    prompt = layout(np.array([5, 6, 7]), [], 1, False)
    assert prompt.runs == (Text(0, 3),)
    assert prompt.position_ids.tolist() == [[0, 1, 2]]
    assert prompt.next_position == 3
    assert layout(np.array([5, 6, 7]), [], 3, True).position_ids.tolist() == [[0, 1, 2]] * 3


def test_images_between_text_numbered_anew_or_where_they_were() -> None:
    grid = Grid(1, 1, "none", (20, 30))
    ids = np.array([1, IMAGE, 2, 3, IMAGE, 4])
    items = [item(PLAIN, grid, [0, 4]), item(PLAIN, grid, [2, 3, 5])]
    anew = layout(ids, items, 1, False)
    assert anew.runs == (Text(0, 1), Visual(0, 0, 2), Text(2, 4), Visual(1, 0, 3), Text(5, 6))
    assert anew.position_ids.tolist() == [list(range(9))]
    assert anew.next_position == 9
    kept = layout(ids, items, 1, True)
    assert kept.runs == anew.runs
    assert kept.position_ids.tolist() == [[0, 1, 5, 7, 8, 11, 12, 14, 15]]
    assert kept.next_position == 16


def test_images_side_by_side_and_at_the_ends() -> None:
    grid = Grid(1, 1, "none", (20, 30))
    prompt = layout(np.array([IMAGE, IMAGE]), [item(PLAIN, grid, [1]), item(PLAIN, grid)], 1, True)
    assert prompt.runs == (Visual(0, 0, 1), Visual(1, 0, 6))
    assert prompt.position_ids.tolist() == [[1, 6, 7, 8, 9, 10, 11]]


def test_runs_of_tiles_with_text_between() -> None:
    grid = Grid(1, 2, "last", (14, 28))
    kept = item(TILED, grid, [1, 3, 4, 11])
    prompt = layout(np.array([IMAGE, 7, IMAGE, 8, IMAGE]), [kept], 1, False)
    assert prompt.runs == (Visual(0, 0, 2), Text(1, 2), Visual(0, 2, 3), Text(3, 4), Visual(0, 3, 4))


def test_three_axes() -> None:
    mrope = spec(Single(resize="exact", size=(20, 30), **NORMAL), (2, 3), 6, positions="mrope", time_scale=4)
    grid = Grid(1, 1, "none", (20, 30))
    assert coordinates(item(mrope, grid), 6, 3).tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    prompt = layout(np.array([1, 2, IMAGE, 3]), [item(mrope, grid, [1, 5])], 3, True)
    assert prompt.position_ids.tolist() == [[0, 1, 2, 2, 5], [0, 1, 2, 3, 5], [0, 1, 3, 4, 5]]
    assert prompt.next_position == 6  # 2 rows, 3 columns: text goes on behind the larger


def test_positions_equal_qwen2_5() -> None:
    """Against get_rope_index of transformers, two images of different shapes with text between."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    config = Qwen2_5_VLConfig(
        text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
        | {"intermediate_size": 8, "vocab_size": 200, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8, "out_hidden_size": 8},
        image_token_id=IMAGE,
        vision_start_token_id=98,
    )
    with torch.device("meta"):
        model = Qwen2_5_VLModel(config)
    shapes = [(2, 3), (5, 2)]
    ids = torch.tensor([[1, 2, 98, *[IMAGE] * 6, 3, 98, *[IMAGE] * 10, 4, 5]])
    grids = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in shapes])
    asked = {"mm_token_type_ids": (ids == IMAGE).int(), "attention_mask": torch.ones_like(ids)}
    want, _ = model.get_rope_index(ids, image_grid_thw=grids, **asked)
    items = []
    for rows, columns in shapes:
        pixels = Single(resize="exact", size=(28 * rows, 28 * columns), **NORMAL)
        items.append(item(spec(pixels, (rows, columns), rows * columns, positions="mrope"), Grid(1, 1, "none", (1, 1))))
    placeholders = np.array([1, 2, 98, IMAGE, 3, 98, IMAGE, 4, 5])
    prompt = layout(placeholders, items, 3, True)
    assert prompt.position_ids.tolist() == want[:, 0].tolist()
    assert prompt.next_position == int(want.max()) + 1


@pytest.mark.parametrize(
    ("pixels", "grid", "candidates", "more", "words"),
    [
        (TILES, (2, 2), 16, {}, "expected 20 candidates"),
        (TILES, (2, 2), 20, {"order": "anyres"}, "order anyres does not go with the tiling grid"),
        (ANYRES.pixels, (4, 4), 88, {}, "order raster does not go with the tiling anyres"),
        (ANYRES.pixels, (4, 4), 80, {"order": "anyres"}, "expected 88 candidates"),
        (ANYRES.pixels, (4, 4), 88, {"order": "anyres", "text": ROWS}, "text between tiles"),
        (TILES, (2, 2), 20, {"tokens_per_unit": 5}, "expected a grid of 5 tokens"),
        (TILES, (2, 2), 20, {"text": {"whole": "none"}}, "expected one {v}"),
        (TILES, (2, 2), 20, {"text": {"tile": "{v}{v}"}}, "expected one {v}"),
        (TILES, (2, 2), 20, {"graph": "decoder"}, "is not a vision graph"),
        (TILES, (2, 2), 20, {"text": {"end": "x"}}, "text of frames with videos, found an image"),
        (TILES, (2, 2), 20, {"text": {"tile": "{v}"}}, "expected one {v} in the text of the thumbnail"),
        (GridTiles(side=4096, min_tiles=64, max_tiles=64, **NORMAL), (1, 1), 65, {}, "pixel values of an image"),
    ],
)
def test_specs_that_do_not_add_up_are_refused(
    pixels: Any, grid: tuple[int, int], candidates: int, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        spec(pixels, grid, candidates, **more)


def test_fewer_placeholders_than_runs_are_refused() -> None:
    with pytest.raises(PromptError, match="a placeholder for each run"):
        layout(np.array([1, 2]), [item(PLAIN, Grid(1, 1, "none", (20, 30)))], 1, False)


def test_the_largest_item_of_the_longest_edge() -> None:
    longest = spec(LongestEdge(side=14, edge=28, **NORMAL), (2, 2), 20)
    assert longest.tiled
    assert arrange(longest, Grid(2, 2, "last", (28, 28))).valid.all()
