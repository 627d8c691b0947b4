"""How one kind of image or video becomes visual tokens: the part of a manifest that a model family writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from flashvlm.budget import ALL, Budget, tokens_kept
from flashvlm.fields import MAX_PIXEL_VALUES, Marker, Pattern, Record, TokenId, Tokens, VisionName, Width
from flashvlm.tilings import AnyRes, Frames, Pixels


class TextLayout(Record):
    """What stands around an item's visual tokens, each run of them a ``{v}``.

    whole     of an item in one piece, or of any item where neither ``tile`` nor ``frame`` is given
    tile      of a tile, in row ``{r}`` and column ``{c}`` from 1; row_end: after each row; last: of the thumbnail
    head, end before and after a video of ``{n}`` frames (``{words}``: in English), ``{hms}`` long (1:02:03)
    frame     of a video's unit ``{i}``, from 1, at ``{mmss}`` (62:03) or ``{seconds}`` (3723.0); join: between them
    """

    whole: Pattern = "{v}"
    tile: Pattern | None = None
    row_end: Pattern = ""
    last: Pattern = ""
    head: Pattern = ""
    frame: Pattern | None = None
    join: Pattern = ""
    end: Pattern = ""

    @model_validator(mode="after")
    def _check(self) -> TextLayout:
        around = (self.row_end, self.head, self.join, self.end)
        if self.whole.count("{v}") != 1 or any("{v}" in text for text in around) or self.last.count("{v}") > 1:
            raise ValueError("expected one {v} for the visual tokens of each unit")
        for name, text in (("tile", self.tile), ("frame", self.frame)):
            if text is not None and text.count("{v}") != 1:
                raise ValueError(f"expected one {{v}} for the visual tokens of a {name}")
        return self


class VisualSpec(Record):
    """How images, or videos, become visual tokens at one size. One of them is an item.

    graph            of vision; its selection graphs are named after it
    placeholder_id   the token that stands for a run of its visual tokens
    marker           what the chat template writes for an item, where it is not that token
    tokens_per_unit  of a tile or frame, ``grid`` rows by columns (the CLS token that ``skip`` names is beside them)
    candidates       tokens at most, in reading order
    order            of the candidates: raster, tile after tile; or anyres: the thumbnail, then rows over all tiles
                     without their padding, each with a newline; of an image made a square, its tokens and one
    newline          end: one behind the last token of a video
    positions        sequential; or mrope: time, height and width, time in ``time_scale`` steps a second of video
    skip             cls: the first token of each unit is never selected, and kept in "all"
    scope            of a budget: item, chosen among all tokens; or unit, the same number of each tile or frame
    """

    modality: Literal["image", "video"] = "image"
    graph: VisionName
    placeholder_id: TokenId
    marker: Marker | None = None
    tokens_per_unit: Tokens
    grid: tuple[Tokens, Tokens]
    candidates: Tokens
    feature_size: Width
    pixels: Pixels
    order: Literal["raster", "anyres"] = "raster"
    newline: Literal["none", "end"] = "none"
    text: TextLayout = TextLayout()
    positions: Literal["sequential", "mrope"] = "sequential"
    time_scale: int = Field(default=1, ge=1, le=1 << 16)
    skip: Literal["none", "cls"] = "none"
    scope: Literal["item", "unit"] = "item"

    @property
    def tiled(self) -> bool:
        """Whether an item has several units, and its graph an ``order``."""
        return self.pixels.tiling != "single"

    def select_size(self, budget: int) -> tuple[int, int]:
        """Candidates and budget of one selection: an item's, or of scope unit a unit's, K // the most units."""
        if self.scope == "item":
            return self.candidates, budget
        return self.tokens_per_unit, min(budget // self.pixels.max_units, self.tokens_per_unit)

    def kept_of(self, count: int, units: int, budget: Budget) -> int:
        """Tokens that a budget keeps of an item of ``count`` tokens in ``units``: ``count`` if nothing is selected."""
        if budget == ALL or self.scope == "item":
            return tokens_kept(budget, count)
        candidates, kept = self.select_size(budget)
        return count if kept >= candidates else units * kept

    @model_validator(mode="after")
    def _check(self) -> VisualSpec:
        cells = math.prod(self.grid) + (self.skip == "cls")
        if cells != self.tokens_per_unit:
            raise ValueError(f"expected a grid of {self.tokens_per_unit} tokens, found {self.grid}")
        if (self.modality == "video") != isinstance(self.pixels, Frames):
            raise ValueError(f"modality {self.modality} does not go with the tiling {self.pixels.tiling}")
        if (self.order == "anyres") != isinstance(self.pixels, AnyRes):
            raise ValueError(f"order {self.order} does not go with the tiling {self.pixels.tiling}")
        if self.scope == "unit" and (not self.tiled or self.order == "anyres"):
            raise ValueError(
                f"a budget for each unit (scope unit) needs tiles or frames one after another, found the tiling "
                f"{self.pixels.tiling}; use scope item"
            )
        if self.candidates != (most := self._most()):
            raise ValueError(f"expected {most} candidates of these tiles, found {self.candidates}")
        if self.newline == "end" and (self.modality != "video" or self.text.frame is not None):
            raise ValueError("a newline at the end goes with a video in one run")
        if self.positions == "mrope" and (self.newline == "end" or self.skip == "cls"):
            raise ValueError("positions mrope are of rows and columns: a newline or CLS token has none")
        text = self.text
        other = (text.tile, text.row_end, text.last) if self.modality == "video" else (text.frame, text.join, text.head)
        if any(other) or (text.end and self.modality == "image"):
            raise ValueError(
                f"text of tiles goes with images and text of frames with videos, found "
                f"{'a video' if self.modality == 'video' else 'an image'}"
            )
        if self.text.tile is not None:
            if self.order == "anyres":
                raise ValueError("text between tiles does not go with rows over all tiles")
            if self.pixels.may_have_thumbnail and self.text.last.count("{v}") != 1:  # without one it is not read
                raise ValueError("expected one {v} in the text of the thumbnail")
        if (numbers := self.pixels.max_units * math.prod(self.pixels.unit_shape)) > MAX_PIXEL_VALUES:
            raise ValueError(f"expected at most {MAX_PIXEL_VALUES:,} pixel values of an image, found {numbers:,}")
        return self

    def _most(self) -> int:
        """The candidates of the largest item there can be."""
        if not isinstance(self.pixels, AnyRes):
            return self.pixels.max_units * self.tokens_per_unit + (self.newline == "end")
        rows, columns = self.grid
        side = self.pixels.side
        lines = max(h // side * rows * (w // side * columns + 1) for h, w in self.pixels.pinpoints)
        return self.tokens_per_unit + lines


def unshared(visual: VisualSpec, budgets: Sequence[int]) -> str | None:
    """What is wrong with a budget that leaves a tile or frame without a token; None where there is no such budget."""
    units, least = visual.pixels.max_units, min(budgets, default=visual.candidates)
    if visual.select_size(least)[1] > 0:
        return None
    return f"a budget that up to {units} tiles or frames share is at least {units}, found {least}"
