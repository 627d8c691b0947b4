"""How an image or a video becomes units of pixels: one setting for each way of tiling, told apart by ``tiling``.

A bundle's manifest says which of these it wants; ``preprocess`` does it.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import PIL.Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

RESAMPLE = {
    "nearest": PIL.Image.Resampling.NEAREST,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Edge = Annotated[int, Field(gt=0, le=4096)]  # pixels: beyond every vision tower there is
Count = Annotated[int, Field(gt=0, le=64)]  # tiles of an image
Colour = Annotated[int, Field(ge=0, le=255)]
FrameCount = Annotated[int, Field(gt=0, le=1024)]  # of a video


class _Pixels(BaseModel):
    """What all share. Sizes are (height, width); mean and std apply after rescale.

    repeat_time: how often one image stands behind another along the channels, for towers that read frames in pairs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    resample: Resample = "bicubic"
    rescale: float = Field(default=1 / 255, gt=0, le=1)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    repeat_time: Literal[1, 2] = 1

    @model_validator(mode="after")
    def _check_std(self) -> _Pixels:
        if min(self.std) <= 0:
            raise ValueError(f"expected std > 0, found {self.std}")
        return self

    @property
    def channels(self) -> int:
        return 3 * self.repeat_time


class _Whole(_Pixels):
    """An image in one piece: resized, then cropped at its centre.

    resize: by its shorter edge; exactly; or by its longer edge and from there exactly (SmolVLM's two steps).
    """

    resize: Literal["shortest_edge", "exact", "longest_edge"]
    size: tuple[Edge, Edge]
    crop: tuple[Edge, Edge] | None = None

    @model_validator(mode="after")
    def _check_size(self) -> _Whole:
        if self.resize != "exact" and self.size[0] != self.size[1]:
            raise ValueError(f"{self.resize} needs size (edge, edge), found {self.size}")
        if self.resize == "shortest_edge" and self.crop is None:
            raise ValueError("shortest_edge needs a crop: a graph takes pixels of one size")
        if self.crop and (self.crop[0] > self.size[0] or self.crop[1] > self.size[1]):
            raise ValueError(f"crop {self.crop} is larger than the resized image {self.size}; padding is not supported")
        return self

    @property
    def unit_shape(self) -> tuple[int, int, int]:
        """[C,H,W] of a unit."""
        return self.channels, *(self.crop or self.size)

    @property
    def max_units(self) -> int:
        """Tiles or frames of an item at most."""
        return 1

    @property
    def may_have_thumbnail(self) -> bool:
        """Whether the whole image may stand behind its tiles."""
        return False


class Single(_Whole):
    """One unit an image."""

    tiling: Literal["single"] = "single"


class Frames(_Whole):
    """Frames of a video, each as an image in one piece; one a unit, or ``repeat_time`` of them behind one another along
    its channels, where the last one stands again for those that lack.

    count       most frames of a video
    rule        which of its frames: the start or middle of each of n equal parts; evenly from the first to the last
                one (ends: rounded; inside: truncated, none twice, and without the ends of a long video)
    fps         frames of each second, in all at most ``count``; None: ``count`` of them, however long the video
    min_frames  taken at least, if there are as many; without fps, a video of fewer is refused
    multiple    what their number is a multiple of
    """

    tiling: Literal["frames"] = "frames"
    count: FrameCount
    rule: Literal["start", "middle", "ends", "inside"] = "start"
    fps: float | None = Field(default=None, gt=0, le=240)
    min_frames: FrameCount = 1
    multiple: FrameCount = 1

    @model_validator(mode="after")
    def _check_frames(self) -> Frames:
        if self.min_frames > self.count or self.count % self.multiple:
            raise ValueError(
                f"expected min_frames up to count and count in multiples of {self.multiple}, "
                f"found {self.min_frames} and {self.count}"
            )
        if self.rule == "inside" and self.fps is None:
            raise ValueError("the rule inside needs fps")
        return self

    @property
    def max_units(self) -> int:
        return math.ceil(self.count / self.repeat_time)


class _Tiled(_Pixels):
    """Square tiles of ``side`` pixels."""

    side: Edge

    @property
    def unit_shape(self) -> tuple[int, int, int]:
        """[C,H,W] of a unit."""
        return self.channels, self.side, self.side


class AnyRes(_Tiled):
    """A thumbnail, then the tiles of the canvas that fits best, on which the image is padded (LLaVA-NeXT).

    pinpoints  (height, width) of the canvases
    border     an image among several of a prompt is one unit instead: made a square by a border of this colour, a
               newline behind its tokens (LLaVA-OneVision). None: it has tiles as well
    """

    tiling: Literal["anyres"] = "anyres"
    pinpoints: tuple[tuple[Edge, Edge], ...] = Field(min_length=1, max_length=64)
    border: tuple[Colour, Colour, Colour] | None = None

    @model_validator(mode="after")
    def _check_pinpoints(self) -> AnyRes:
        for height, width in self.pinpoints:
            if height % self.side or width % self.side:
                raise ValueError(f"expected pinpoints in multiples of {self.side}, found {(height, width)}")
        return self

    @property
    def max_units(self) -> int:
        return 1 + max(height * width for height, width in self.pinpoints) // self.side**2

    @property
    def may_have_thumbnail(self) -> bool:
        return False  # it stands before them


class GridTiles(_Tiled):
    """The grid of ``min_tiles`` to ``max_tiles`` whose aspect ratio is nearest, then a thumbnail if there are several
    (InternVL)."""

    tiling: Literal["grid"] = "grid"
    min_tiles: Count
    max_tiles: Count
    thumbnail: bool = True

    @model_validator(mode="after")
    def _check_tiles(self) -> GridTiles:
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"expected min_tiles up to max_tiles, found {self.min_tiles} and {self.max_tiles}")
        return self

    @property
    def max_units(self) -> int:
        return self.max_tiles + self.may_have_thumbnail

    @property
    def may_have_thumbnail(self) -> bool:
        return self.thumbnail and self.max_tiles > 1


class LongestEdge(_Tiled):
    """Resized to its longer edge and to multiples of ``side``, then tiles and a thumbnail if there are several
    (SmolVLM)."""

    tiling: Literal["longest"] = "longest"
    edge: Edge

    @property
    def max_units(self) -> int:
        # An aspect of 1 has the most; its shorter edge is made even.
        tiles = math.ceil((self.edge + self.edge % 2) / self.side) ** 2
        return tiles + (tiles > 1)

    @property
    def may_have_thumbnail(self) -> bool:
        return self.max_units > 1


Pixels = Annotated[Single | AnyRes | GridTiles | LongestEdge | Frames, Field(discriminator="tiling")]
