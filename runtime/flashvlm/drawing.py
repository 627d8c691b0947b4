"""Drawing with Pillow alone: text that wraps and whose characters the font has, legends, and a colour scale.

Lengths are pixels of the picture.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Rgb = tuple[int, int, int]

INK, MUTED, RULE, MAT, PAPER = (24, 28, 36), (98, 106, 120), (222, 226, 232), (241, 243, 246), (255, 255, 255)

# Dark blue to yellow in equal steps of OKLab (https://bottosson.github.io/posts/oklab), lightness 0.20 to
# 0.94.
_RAMP = ("080e3e", "0a2d5a", "084c77", "186d89", "2d8e98", "5aac93", "87c883", "c2dd70", "ffef54")
RAMP = np.array([list(bytes.fromhex(colour)) for colour in _RAMP], dtype=np.float32)  # [9,3]

# --- text ----------------------------------------------------------------------------------------------------------

# Where systems keep fonts with many scripts; Pillow's own has Latin alone. The first that has a text's characters wins.
_FOLDERS = (
    "/usr/share/fonts/truetype/dejavu",
    "/usr/share/fonts/TTF",
    "/usr/share/fonts/dejavu-sans-fonts",
    "/usr/share/fonts/truetype/noto",
    "/usr/share/fonts/opentype/noto",
    "/usr/share/fonts/noto-cjk",
    "/usr/share/fonts/google-noto-cjk",
    "/System/Library/Fonts",
    "/System/Library/Fonts/Supplemental",
    "/Library/Fonts",
    "C:/Windows/Fonts",
)
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "segoeui.ttf",
    "msyh.ttc",
)
_ABSENT = "\U0010ffff"  # a character that no font has: drawn as the box for all that are missing


class Text(NamedTuple):
    """Characters and a font that has them."""

    words: str
    font: Any

    def width(self, part: str) -> int:
        """Of a part of the words in whole pixels, rounded up."""
        return math.ceil(self.font.getlength(part))


def in_font(text: str, size: int) -> Text:
    """``text`` and the first font that has it all.

    Where there is none, what the best one lacks is written as escapes such as ``\\u65e5``; a text of which that is more
    than half is replaced by a note.
    """
    wanted = {c for c in text if not c.isspace()}
    best: tuple[int, Any, frozenset[str]] | None = None
    for path in (None, *_system_fonts()):
        font = _load(path, size)
        missing = frozenset(c for c in wanted if not _has(path, c))
        if not missing:
            return Text(text, font)
        if best is None or len(missing) < best[0]:
            best = len(missing), font, missing
    assert best is not None
    _, font, missing = best
    if 2 * sum(text.count(c) for c in missing) > sum(not c.isspace() for c in text):
        return Text("(text that no font on this machine can draw)", font)
    return Text("".join(c.encode("unicode_escape").decode("ascii") if c in missing else c for c in text), font)


def plain_font(size: int) -> Any:
    """Pillow's own font, for words of ours."""
    return _load(None, size)


@functools.cache
def _system_fonts() -> tuple[str, ...]:
    found = (Path(folder, name) for name in _FONTS for folder in _FOLDERS)
    return tuple(str(path) for path in found if path.is_file())


@functools.cache
def _load(path: str | None, size: int) -> Any:
    return ImageFont.load_default(size=size) if path is None else ImageFont.truetype(path, size)


@functools.cache
def _glyph(path: str | None, character: str) -> tuple[tuple[int, int], bytes]:
    mask = _load(path, 16).getmask(character)
    return mask.size, bytes(mask)


@functools.lru_cache(maxsize=10_000)
def _has(path: str | None, character: str) -> bool:
    # Pillow does not tell which characters a font has; those it lacks all look like the one that none has.
    return _glyph(path, character) != _glyph(path, _ABSENT) and character.isprintable()


def wrap(text: Text, width: int, most: int) -> list[str]:
    """Lines of at most ``width`` pixels, at most ``most`` of them; words that are too long, or Chinese, break."""
    lines: list[str] = []
    for paragraph in text.words.strip()[:10_000].splitlines():
        line = ""
        for word in paragraph.split():
            trial = f"{line} {word}" if line else word
            if text.width(trial) <= width:
                line = trial
                continue
            if line:
                lines.append(line)
            while text.width(word) > width:
                fits = max(1, bisect_right(range(1, len(word)), width, key=lambda n: text.width(word[:n])))
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
        if len(lines) > most:
            return [*lines[: most - 1], f"{lines[most - 1]} ...".strip()]
    return lines


def shorten(text: Text, width: int) -> str:
    """The text on one line, with dots where it is too long."""
    words = " ".join(text.words.split())
    if text.width(words) <= width:
        return words
    fits = bisect_right(range(len(words)), width, key=lambda n: text.width(f"{words[:n]}..."))
    return f"{words[: max(0, fits - 1)].rstrip()}..."


# --- legends -------------------------------------------------------------------------------------------------------

SWATCH, LINE = 22, 36  # of a legend: the side of a square, and from one line to the next


class Entry(NamedTuple):
    """What a colour stands for; ``paint`` draws its square, [SWATCH, SWATCH] from a corner."""

    text: str
    paint: Callable[[ImageDraw.ImageDraw, int, int], None]


def filled(fill: Rgb, outline: Rgb | None = None) -> Callable[[ImageDraw.ImageDraw, int, int], None]:
    """A square of one colour, with an outline of another."""

    def paint(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
        side = SWATCH - 1
        draw.rectangle((x, y, x + side, y + side), fill=fill, outline=outline, width=4 if outline else 0)

    return paint


def hatched(fill: Rgb, stroke: Rgb) -> Callable[[ImageDraw.ImageDraw, int, int], None]:
    """A square with diagonal lines."""

    def paint(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
        side = SWATCH - 1
        draw.rectangle((x, y, x + side, y + side), fill=fill)
        for step in range(4, 2 * side, 9):
            ends = (x + min(step, side), y + max(step - side, 0)), (x + max(step - side, 0), y + min(step, side))
            draw.line(ends, fill=stroke, width=2)

    return paint


def flow(entries: Iterable[Entry], font: Any, width: int) -> Iterator[tuple[int, int, Entry]]:
    """Entries from left to right, on a new line where ``width`` ends: (x, y, entry)."""
    x = y = 0
    for entry in entries:
        taken = SWATCH + 10 + round(font.getlength(entry.text))
        if x and x + taken > width:
            x, y = 0, y + LINE
        yield x, y, entry
        x += taken + 28


def draw_legend(page: Image.Image, at: tuple[int, int], entries: Iterable[Entry], font: Any, width: int) -> int:
    """Draws a legend and returns its height."""
    draw, height = ImageDraw.Draw(page), 0
    for x, y, entry in flow(entries, font, width):
        entry.paint(draw, at[0] + x, at[1] + y)
        draw.text((at[0] + x + SWATCH + 10, at[1] + y + SWATCH // 2), entry.text, INK, font, anchor="lm")
        height = y + SWATCH
    return height


# --- colours of numbers --------------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """What the ends of the ramp stand for; ``below`` and ``above``: whether there are values beyond them."""

    low: float
    high: float
    below: bool = False
    above: bool = False

    @classmethod
    def of(cls, values: np.ndarray, percentiles: tuple[float, float] = (2, 98)) -> Scale:
        """Between percentiles of finite values [n], so that one outlier does not take all the colours."""
        least, most = float(values.min()), float(values.max())
        low, high = (float(value) for value in np.percentile(values, percentiles, method="nearest"))
        if low == high:  # nearly all are one value: the others are what there is to see
            low, high = least, most
        return cls(low, high, least < low, most > high)

    def level(self, values: np.ndarray) -> np.ndarray:
        """Values [...] -> 0 to 1, both ends included; a half where the scale has no length."""
        # Halves first: the range of two large floats may overflow.
        span = self.high / 2 - self.low / 2
        inside = np.clip(values, self.low, self.high)
        return (inside / 2 - self.low / 2) / span if span else np.full_like(inside, 0.5)


def ramp(level: np.ndarray) -> np.ndarray:
    """0 to 1, [...] -> float32 [...,3], from dark blue to yellow."""
    stops = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(level, stops, RAMP[:, channel]) for channel in range(3)], axis=-1)


def draw_scale(page: Image.Image, at: tuple[int, int], width: int, scale: Scale, font: Any) -> int:
    """The ramp as a bar with numbers at its ends and in the middle; returns the height of it all."""
    x, y = at
    draw = ImageDraw.Draw(page)
    level = np.linspace(0, 1, width) if scale.low < scale.high else np.full(width, 0.5)
    bar = np.broadcast_to(ramp(level)[None], (SWATCH, width, 3)).astype(np.uint8)
    page.paste(Image.fromarray(bar), at)
    below = y + SWATCH + 10
    if scale.low == scale.high:
        draw.text((x + width // 2, below), f"{scale.low:.3g} everywhere", INK, font, anchor="mt")
    else:
        for share, anchor in ((0.0, "lt"), (0.5, "mt"), (1.0, "rt")):
            value = scale.low * (1 - share) + scale.high * share
            beyond = "< " if share == 0 and scale.below else "> " if share == 1 and scale.above else ""
            draw.text((x + share * (width - 1), below), f"{beyond}{value:.3g}", INK, font, anchor=anchor)
    return SWATCH + 10 + font.size
