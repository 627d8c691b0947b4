"""The picture of `--show` for a video: the frames that were shown to the model, and which patches of each it kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from flashvlm.drawing import INK, MUTED, PAPER, draw_legend, in_font, plain_font, shorten
from flashvlm.kept_picture import (
    MARGIN,
    PANEL,
    PANELS_Y,
    check_selection,
    draw_texts,
    heading,
    legend_of,
    legend_of_others,
)
from flashvlm.patches import View, kept_patches
from flashvlm.token_boxes import token_boxes, token_units

if TYPE_CHECKING:
    from flashvlm.encoder import Selection
    from flashvlm.frames import Clip

WIDTH = 3 * PANEL + 2 * MARGIN  # of all frames of a row; all lengths are pixels of the picture
HEIGHT = 1500  # of all rows at most, as long as frames are no narrower than NARROW
NARROW = 150
GAP, LABEL = 20, 30  # between frames, and above each


def draw_sheet(
    frames: Sequence[Image.Image],
    selection: Selection,
    question: str = "",
    answer: str = "",
    method: str = "",
    name: str = "",
) -> Image.Image:
    """The frames in order, each with its number and time, its kept patches and their count; question and answer.

    frames     RGB, those that the model saw, all of one size; where it reads them in pairs, both show the same patches
    selection  of the video's tokens
    method     name of the selection method
    name       of the video, before the heading

    Raises ValueError if the selection does not fit the frames.
    """
    check_selection(selection)
    kept, clip = selection.kept, selection.grid.clip
    if clip is None or not frames or len(frames) != len(clip.indices):
        raise ValueError(f"expected {0 if clip is None else len(clip.indices)} frames, found {len(frames)}")
    labels, units = frame_labels(clip), [number // clip.together for number in range(len(frames))]
    boxes, unit_of = token_boxes(selection.spec, selection.grid), token_units(selection.spec, selection.grid)
    placed = ~np.isnan(boxes[:, 0])
    columns, width, height = _grid(len(frames), frames[0].height / frames[0].width, clip.together)
    rows = math.ceil(len(frames) / columns)
    below = PANELS_Y + rows * (height + LABEL + GAP)
    page = Image.new("RGB", (WIDTH + 2 * MARGIN, below + 400), PAPER)
    draw, small = ImageDraw.Draw(page), plain_font(18)
    title = in_font(heading(selection, method, name), 31)
    draw.text((MARGIN, MARGIN + 28), shorten(title, WIDTH), INK, title.font, anchor="ls")
    caption = "What the model saw" if len(kept) == selection.count else "Kept patches of each frame"
    if clip.together > 1:
        caption += "; two in a row share their tokens"
    draw.text((MARGIN, PANELS_Y - 16), caption, INK, plain_font(24), anchor="ls")
    for number, (frame, unit, label) in enumerate(zip(frames, units, labels, strict=True)):
        tokens = np.flatnonzero(placed & (unit_of == unit))
        view = View.of(frame, np.where((unit_of == unit)[:, None], boxes, np.nan), width, height)
        row, column = divmod(number, columns)
        x, y = MARGIN + column * (width + GAP), PANELS_Y + row * (height + LABEL + GAP)
        page.paste(kept_patches(view, tokens, kept, selection.is_top), (x, y + LABEL))
        many = f"{int(np.isin(kept, tokens).sum()):,} kept" if len(kept) < selection.count else ""
        room = width - small.getlength(many) - 12
        draw.text((x, y + LABEL - 7), shorten(in_font(label, 18), int(room)), INK, small, anchor="ls")
        draw.text((x + view.photo.width, y + LABEL - 7), many, MUTED, small, anchor="rs")
    legend = [*legend_of(np.flatnonzero(placed), selection), *legend_of_others(placed, selection)]
    below += draw_legend(page, (MARGIN, below), legend, plain_font(20), WIDTH) if legend else -GAP
    return draw_texts(page, below + 28, (question, answer))


def frame_labels(clip: Clip) -> list[str]:
    """Of each frame, its number from 0 and its time: ``46 at 0:01.8``."""
    tenths = [round(10 * index / clip.fps) for index in clip.indices]
    return [
        f"{index:,} at {time // 600}:{time % 600 // 10:02}.{time % 10}"
        for index, time in zip(clip.indices, tenths, strict=True)
    ]


def _grid(count: int, aspect: float, together: int) -> tuple[int, int, int]:
    """Columns for ``count`` frames of height / width ``aspect``, in multiples of ``together``, and the largest width
    and height of each that fit."""
    columns, width, height = 0, 0, 0
    fits = False
    for wanted in range(together, WIDTH // (NARROW + GAP) + 1, together):
        narrower = min(PANEL, (WIDTH - (wanted - 1) * GAP) // wanted)
        if fits and narrower < width:
            break
        columns, width, height = wanted, narrower, max(1, round(aspect * narrower))
        fits = math.ceil(count / columns) * (height + LABEL + GAP) <= HEIGHT
    return columns, width, height
