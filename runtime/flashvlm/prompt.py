"""Where visual tokens stand among those of the text, and at which positions: the same four steps for every model.

    tile(image, pixels)    -> pixels [U,C,H,W], Grid              (preprocess.py; stack(frames, pixels) of a video)
    arrange(spec, grid)    -> order [N], valid [N], count         reading order of the tokens of its tiles
    expand(spec, grid)     -> text with one "{v}" for each run of visual tokens, tokenized with the prompt
    layout(ids, items)     -> runs of text and visual tokens, position_ids [A,T], next_position

A manifest says what to do (``VisualSpec``); no model is named here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np

from flashvlm.errors import PromptError
from flashvlm.frames import Clip
from flashvlm.preprocess import Grid
from flashvlm.text.numbers import in_words
from flashvlm.text.processor import RUN
from flashvlm.tilings import AnyRes
from flashvlm.visual import TextLayout, VisualSpec


@dataclass(frozen=True, eq=False)
class Arrangement:
    """How the tokens of an item's tiles or frames are read.

    order  int64 [N]: place of each candidate among the newline (0) and the tokens of all tiles; padding, 0, is last
    valid  bool [N]: visual tokens that may be selected; False for newlines, CLS and padding
    count  candidates that are no padding: those of "all"
    """

    order: np.ndarray
    valid: np.ndarray
    count: int


@dataclass(frozen=True, eq=False)
class Item:
    """One image or video of a prompt.

    count  its tokens, without padding
    kept   int64 [K] ascending: which of them go to the language model
    """

    spec: VisualSpec
    grid: Grid
    count: int
    kept: np.ndarray


@dataclass(frozen=True)
class Text:
    """Tokens ``start`` to ``stop`` of the prompt's ids."""

    start: int
    stop: int


@dataclass(frozen=True)
class Visual:
    """Tokens ``start`` to ``stop`` of those kept of an item."""

    item: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the decoder reads it: runs of T tokens in all.

    position_ids   int64 [A,T]; one axis, or time, height and width
    next_position  of the first new token, on every axis: behind all others
    """

    runs: tuple[Text | Visual, ...]
    position_ids: np.ndarray
    next_position: int


def arrange(spec: VisualSpec, grid: Grid) -> Arrangement:
    """Reading order of an item's tokens, padded to the spec's candidates."""
    n = spec.tokens_per_unit
    if spec.order == "anyres" and not grid.square:
        assert isinstance(spec.pixels, AnyRes)
        tokens = _unpadded(grid, *spec.grid)
    else:
        tokens = 1 + np.arange(grid.units * n)
        if spec.newline == "end" or grid.square:
            tokens = np.append(tokens, 0)
    order = np.zeros(spec.candidates, dtype=np.int64)
    order[: len(tokens)] = tokens
    valid = order > 0
    if spec.skip == "cls":
        valid &= (order - 1) % n != 0
    return Arrangement(order, valid, len(tokens))


def select_rows(spec: VisualSpec, grid: Grid, valid: np.ndarray) -> np.ndarray:
    """valid bool [N] of an item -> [R,n], a row for each selection among its tokens: one, or of scope unit one a
    unit."""
    if spec.scope == "item":
        return valid[None]
    return valid[: grid.units * spec.tokens_per_unit].reshape(grid.units, -1)


def _unpadded(grid: Grid, rows: int, columns: int) -> np.ndarray:
    """The thumbnail, then rows of the tiles' tokens that show the image and not its padding, each with a newline.

    Rounding follows ``unpad_image`` of transformers' LLaVA-NeXT.
    """
    high, wide = grid.rows * rows, grid.columns * columns
    height, width = grid.size
    top = left = 0
    if width / height > wide / high:
        top = (high - int(round(height * (wide / width), 7))) // 2
    else:
        left = (wide - int(round(width * (high / height), 7))) // 2
    y, x = np.mgrid[top : high - top, left : wide - left]
    unit = 1 + (y // rows) * grid.columns + x // columns  # the thumbnail is unit 0
    tokens = 1 + (unit * rows + y % rows) * columns + x % columns
    lines = np.pad(tokens, ((0, 0), (0, 1)))  # 0: the newline
    return np.concatenate([1 + np.arange(rows * columns), lines.ravel()])


def expand(spec: VisualSpec, grid: Grid) -> str:
    """What stands in the prompt for an item: text around its runs of visual tokens, each a ``{v}``."""
    text = spec.text
    if grid.clip is not None:
        return _video(text, grid.clip)
    if text.tile is None or grid.rows * grid.columns == 1:
        return text.whole
    lines = []
    for row in range(grid.rows):
        cells = (_filled(text.tile, {"r": row + 1, "c": column + 1}) for column in range(grid.columns))
        lines.append("".join(cells) + text.row_end)
    return "".join(lines) + (text.last if grid.thumbnail == "last" else "")


def _video(text: TextLayout, clip: Clip) -> str:
    frames, duration = len(clip.indices), timedelta(seconds=int(clip.duration))
    of_all: dict[str, int | str] = {"n": frames, "words": in_words(frames), "hms": str(duration)}
    units = text.whole
    if text.frame is not None:
        units = text.join.join(_frame(text.frame, i, time) for i, time in enumerate(clip.times, start=1))
    return _filled(text.head, of_all) + units + _filled(text.end, of_all)


def _frame(pattern: str, i: int, time: float) -> str:
    minutes, seconds = divmod(int(time), 60)
    return _filled(pattern, {"i": i, "mmss": f"{minutes:02d}:{seconds:02d}", "seconds": f"{time:.1f}"})


def _filled(pattern: str, values: Mapping[str, int | str]) -> str:
    # Not str.format: a pattern is the bundle's, and reaches into nothing.
    for name, value in values.items():
        pattern = pattern.replace(f"{{{name}}}", str(value))
    return pattern


def run_lengths(item: Item) -> list[int]:
    """Candidates in each run of an item, as many as ``expand`` has of them."""
    runs = expand(item.spec, item.grid).count(RUN)
    return [item.count] if runs == 1 else [item.spec.tokens_per_unit] * item.grid.units


def layout(ids: np.ndarray, items: Sequence[Item], axes: int, keep_positions: bool) -> Prompt:
    """Puts the visual tokens in place of their placeholders.

    Args:
        ids: int64 [T] of the prompt, with one placeholder id of the item's spec for each run.
        items: in the order of their placeholders.
        axes: of the positions.
        keep_positions: tokens stand at the positions they have among all; else, on one axis, they are numbered anew.
    """
    runs: list[Text | Visual] = []
    positions: list[np.ndarray] = []  # [A, tokens of a run]
    cursor = done = furthest = 0
    places = np.flatnonzero(np.isin(ids, [item.spec.placeholder_id for item in items]))
    if len(places) != sum(len(run_lengths(item)) for item in items):
        raise PromptError(f"expected a placeholder for each run of visual tokens, found {len(places)}; export again")
    at = iter(places.tolist())

    def text(stop: int) -> None:
        nonlocal cursor, done
        if stop > done:
            runs.append(Text(done, stop))
            positions.append(np.tile(cursor + np.arange(stop - done), (axes, 1)))
            cursor += stop - done
        done = stop + 1

    for number, item in enumerate(items):
        first = 0
        for length in run_lengths(item):
            text(next(at))
            start, stop = np.searchsorted(item.kept, (first, first + length)).tolist()
            runs.append(Visual(number, start, stop))
            if keep_positions:
                places_of = cursor + coordinates(item, length, axes)  # [A, length]
                positions.append(places_of[:, item.kept[start:stop] - first])
                furthest = max(furthest, int(places_of.max()) + 1)
                cursor += length if item.spec.positions == "sequential" else max(item.spec.grid)
            else:
                positions.append(np.tile(cursor + np.arange(stop - start), (axes, 1)))
                cursor += stop - start
            first += length
    text(len(ids))
    joined = np.concatenate(positions, axis=1) if positions else np.zeros((axes, 0), dtype=np.int64)
    return Prompt(tuple(runs), joined.astype(np.int64), max(cursor, furthest))


def coordinates(item: Item, length: int, axes: int) -> np.ndarray:
    """int64 [A, length]: where the tokens of a run are, from the run's own start.

    On three axes, text goes on behind the largest row or column: it may have the numbers of later frames
    (``get_rope_index`` of transformers' Qwen2.5-VL, which also multiplies in float32).
    """
    index = np.arange(length)
    if item.spec.positions == "sequential":
        return np.tile(index, (axes, 1))
    rows, columns = item.spec.grid
    unit, cell = np.divmod(index, rows * columns)
    step = np.float32(1)
    if item.grid.clip is not None:
        step = np.float32(item.spec.time_scale) * np.float32(item.grid.clip.seconds_per_unit)
    time = (unit.astype(np.float32) * step).astype(np.int64)
    return np.stack([time, *np.divmod(cell, columns)]).astype(np.int64)
