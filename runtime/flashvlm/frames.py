"""Which frames of a video are shown, and when."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flashvlm.errors import VideoError
from flashvlm.tilings import Frames

# Of frames whose rate nobody tells, where the bundle names none: transformers' own assumption.
UNKNOWN_FPS = 24.0
EDGE = 1.0  # seconds at each end of a long video that the rule "inside" leaves out


class Clip(NamedTuple):
    """The frames of a video that are shown.

    indices   ascending, among all of its frames
    total     frames of the video
    fps       that it has a second
    together  frames in a unit; the last one stands again where they do not add up
    """

    indices: tuple[int, ...]
    total: int
    fps: float
    together: int = 1

    @property
    def units(self) -> int:
        return math.ceil(len(self.indices) / self.together)

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.total / self.fps

    @property
    def seconds_per_unit(self) -> float:
        """Between the starts of units, on average."""
        return self.together / (len(self.indices) / self.total * self.fps)

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds of each unit: the middle of its first and last frame."""
        seconds = [index / self.fps for index in self.indices]
        seconds += seconds[-1:] * (-len(seconds) % self.together)
        n = self.together
        return tuple((seconds[i] + seconds[i + n - 1]) / 2 for i in range(0, len(seconds), n))


def clip_of(total: int, fps: float | None, pixels: Frames) -> Clip:
    """What is shown of a video of ``total`` frames, ``fps`` a second (None: as many as the bundle samples)."""
    fps = fps or pixels.fps or UNKNOWN_FPS
    return Clip(choose_frames(total, fps, pixels), total, fps, pixels.repeat_time)


def choose_frames(total: int, fps: float, pixels: Frames) -> tuple[int, ...]:
    """Indices of frames, ascending, at most ``pixels.count``.

    Args:
        total: frames of the video.
        fps: that it has a second.
        pixels: how many, and by which rule. They follow ``sample_frames`` of transformers' video processors, in exact
            arithmetic: theirs, in float32, now and then gives one index more, beyond the last frame.

    Raises:
        VideoError: there are too few.

    Example:
        >>> pixels = Frames(resize="exact", size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), count=4, rule="middle")
        >>> choose_frames(100, 25.0, pixels)
        (12, 37, 62, 87)
    """
    n = _number(total, fps, pixels)
    least = pixels.multiple if pixels.fps is not None else max(pixels.multiple, pixels.min_frames)
    if total < least or n < 1:
        raise VideoError(f"expected a video of at least {least} frames, found {total}; take a longer one")
    match pixels.rule:
        case "start":
            return tuple(i * total // n for i in range(n))
        case "middle":
            return tuple((2 * i + 1) * total // (2 * n) for i in range(n))
        case "ends":
            return tuple(np.linspace(0, total - 1, n).round().astype(int).tolist())
        case "inside":
            first, last = _inside(total, fps, pixels)
            return tuple(sorted({*np.linspace(first, last, n, dtype=int).tolist()}))


def _number(total: int, fps: float, pixels: Frames) -> int:
    most = min(pixels.count, total)
    if pixels.fps is not None:
        wanted = min(pixels.fps * (total / fps), pixels.count + 1)
        if pixels.rule == "inside":
            wanted = round(wanted)
        most = math.floor(min(max(wanted, pixels.min_frames, pixels.multiple), most))
    return most - most % pixels.multiple


def _inside(total: int, fps: float, pixels: Frames) -> tuple[int, int]:
    """The first and last frame between which others are taken."""
    assert pixels.fps is not None
    first, last = 0, total - 1
    # Frames, not seconds, on the right: as transformers has it.
    if total / fps - 2 * EDGE > pixels.count * pixels.fps:
        first, last = max(0, int(EDGE * fps)), min(int(total - EDGE * fps), total - 1)
    return (first, last) if first < last else (0, total - 1)
