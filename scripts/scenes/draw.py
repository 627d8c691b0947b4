"""A scene as pixels. Masks, glyphs and grounds are made once and reused, so a scene costs a few milliseconds."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from scenes.world import COLORS, GRID, PATCH, Scene, Thing

SUPERSAMPLED = 4
_BANK = 512  # pixels a side of the ground that windows are cut from
# Muted, so that every colour of a thing stands out from every ground.
_GROUND_COLORS = {
    "grass": (96, 128, 80),
    "sand": (206, 186, 146),
    "water": (92, 136, 164),
    "brick": (150, 96, 82),
    "wood": (142, 108, 76),
    "sky": (168, 196, 220),
    "night": (46, 48, 74),
    "snow": (222, 228, 234),
}


def draw(scene: Scene) -> np.ndarray:
    """Pixels uint8 [S,S,3]; S = 14 * side."""
    rng = np.random.default_rng(scene.seed)
    canvas = _clutter(_ground(scene, rng), rng).astype(np.float32)
    for thing in scene.things:
        _paint(canvas, thing, scene, rng)
    row, column = rng.integers(0, _BANK - canvas.shape[0], size=2)
    canvas += rng.uniform(0.3, 1.0) * _noise()[row : row + canvas.shape[0], column : column + canvas.shape[1]]
    return canvas.clip(0, 255).astype(np.uint8)


def owners(scene: Scene) -> np.ndarray:
    """Which thing each pixel shows, int64 [S,S]: 0 for the ground, i + 1 for ``scene.things[i]``."""
    owned = np.zeros((scene.side * PATCH,) * 2, dtype=np.int64)
    for index, thing in enumerate(scene.things):
        body, _ = _shape(thing.shape, thing.diameter, thing.angle)
        owned[_window(thing, scene)][body > 0.5] = index + 1
    return owned


def _window(thing: Thing, scene: Scene) -> tuple[slice, slice]:
    size = thing.diameter
    row, column = round(thing.y - scene.top * PATCH - size / 2), round(thing.x - scene.left * PATCH - size / 2)
    return np.s_[row : row + size, column : column + size]


def _paint(canvas: np.ndarray, thing: Thing, scene: Scene, rng: np.random.Generator) -> None:
    size = thing.diameter
    body, rim = _shape(thing.shape, size, thing.angle)  # [d,d] in 0..1
    color = np.array(COLORS[thing.color], np.float32) * rng.uniform(0.9, 1.04) + rng.normal(0, 5, 3)
    dark = color.mean() < 60
    other = color * 0.45 + (110 if dark else 0)
    ink = _pattern(thing.pattern, size, int(rng.integers(4)))[..., None]  # [d,d,1]
    paint = color * (1 - ink) + other * ink
    if thing.character:
        glyph = _glyph(thing.character, size)[..., None]
        paint = paint * (1 - glyph) + glyph * (20.0 if color @ (0.3, 0.59, 0.11) > 120 else 245.0)
    paint = paint * (1 - rim[..., None]) + rim[..., None] * (color * 0.4 + (60 if dark else 0))
    window, alpha = _window(thing, scene), body[..., None]
    canvas[window] = canvas[window] * (1 - alpha) + paint * alpha


@cache
def _shape(shape: str, diameter: int, angle: int) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel a shape covers, and its rim, both float32 [d,d]."""
    side = diameter * SUPERSAMPLED
    image = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(image)

    def polygon(points: list[tuple[float, float]]) -> None:  # in -1..1, y down
        pen.polygon([((1 + x) * side / 2, (1 + y) * side / 2) for x, y in points], fill=255)

    def disc(x: float, y: float, r: float, fill: int = 255) -> None:
        box = [(1 + x - r) * side / 2, (1 + y - r) * side / 2, (1 + x + r) * side / 2, (1 + y + r) * side / 2]
        pen.ellipse(box, fill=fill)

    def turned(n: int, radius: float, start: float) -> list[tuple[float, float]]:
        steps = [start + 2 * math.pi * i / n for i in range(n)]
        return [(radius * math.sin(a), -radius * math.cos(a)) for a in steps]

    if shape == "circle":
        disc(0, 0, 0.96)
    elif shape == "square":
        polygon([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    elif shape == "triangle":
        polygon([(0, -0.92), (0.94, 0.78), (-0.94, 0.78)])
    elif shape == "diamond":
        polygon([(0, -0.98), (0.72, 0), (0, 0.98), (-0.72, 0)])
    elif shape == "star":
        outer, inner = turned(5, 0.98, 0.0), turned(5, 0.42, math.pi / 5)
        polygon([point for pair in zip(outer, inner, strict=True) for point in pair])
    elif shape == "cross":
        polygon([(-0.32, -0.95), (0.32, -0.95), (0.32, 0.95), (-0.32, 0.95)])
        polygon([(-0.95, -0.32), (0.95, -0.32), (0.95, 0.32), (-0.95, 0.32)])
    elif shape == "ring":
        disc(0, 0, 0.96)
        disc(0, 0, 0.5, fill=0)
    elif shape == "heart":
        disc(-0.44, -0.36, 0.5)
        disc(0.44, -0.36, 0.5)
        polygon([(-0.9, -0.16), (0, -0.3), (0.9, -0.16), (0, 0.95)])
    else:  # moon
        disc(-0.04, 0, 0.94)
        disc(0.44, -0.14, 0.72, fill=0)
    image = image.rotate(angle, Image.Resampling.BILINEAR)
    inside = image.filter(ImageFilter.MinFilter(2 * SUPERSAMPLED + 1))
    small = (diameter, diameter)
    body = np.asarray(image.resize(small, Image.Resampling.BOX), np.float32) / 255
    return body, body - np.asarray(inside.resize(small, Image.Resampling.BOX), np.float32) / 255


@cache
def _pattern(pattern: str, size: int, variant: int) -> np.ndarray:
    """Where the second colour goes, float32 [d,d]."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    if pattern == "striped":
        along = (x, y, (x + y) / 1.414, (x - y) / 1.414)[variant]
        return (along % 10 < 5).astype(np.float32)
    if pattern == "dotted":
        return (((x + variant) % 10 - 5) ** 2 + ((y + 2 * variant) % 10 - 5) ** 2 < 9).astype(np.float32)
    if pattern == "checkered":
        return (((x + variant) // 8 + y // 8) % 2).astype(np.float32)
    return np.zeros((size, size), np.float32)


@cache
def _glyph(character: str, size: int) -> np.ndarray:
    """A character in the middle of a sign, float32 [d,d]."""
    image = Image.new("L", (size, size), 0)
    font = ImageFont.load_default(size=size * 0.62)
    ImageDraw.Draw(image).text((size / 2, size / 2), character, fill=255, font=font, anchor="mm", stroke_width=1)
    return np.asarray(image, np.float32) / 255


@cache
def _noise() -> np.ndarray:
    """Grain with a little colour, float32 [512,512,3]."""
    rng = np.random.default_rng(1)
    grain = rng.normal(0, 7, (_BANK, _BANK, 1)) + rng.normal(0, 4, (_BANK, _BANK, 3))
    return grain.astype(np.float32)


@cache
def _bank(ground: str) -> np.ndarray:
    """A texture for each ground, float32 [512,512,3], the same on every machine."""
    rng = np.random.default_rng(sorted(_GROUND_COLORS).index(ground))
    y, x = np.mgrid[:_BANK, :_BANK].astype(np.float32)

    def smooth(radius: float, stretch: tuple[float, float] = (1, 1)) -> np.ndarray:
        small = rng.random((max(2, int(_BANK / radius / stretch[1])), max(2, int(_BANK / radius / stretch[0]))))
        image = Image.fromarray((small * 255).astype(np.uint8)).resize((_BANK, _BANK), Image.Resampling.BICUBIC)
        return np.asarray(image, np.float32) / 127.5 - 1

    light = {
        "grass": lambda: 26 * smooth(3, (1, 5)) + 12 * smooth(40),
        "sand": lambda: 14 * smooth(2) + 10 * np.sin((y + 14 * smooth(50)) / 7),
        "water": lambda: 22 * np.sin((y + 10 * smooth(40)) / 4.5) * (0.5 + 0.5 * smooth(24, (3, 1))) + 8 * smooth(30),
        "brick": lambda: 12 * smooth(5) + 10 * smooth(24, (1.6, 0.8)) + 44 * _mortar(x, y),
        "wood": lambda: 20 * np.sin((x + 20 * smooth(60, (1, 4))) / 5) + 8 * smooth(3, (1, 8)),
        "sky": lambda: 34 * np.maximum(smooth(60, (2, 1)), 0) + 6 * smooth(20),
        "night": lambda: 6 * smooth(40) + 150 * (rng.random((_BANK, _BANK)) > 0.997),
        "snow": lambda: 7 * smooth(30) + 14 * (smooth(3) > 0.6),
    }[ground]()
    return (np.array(_GROUND_COLORS[ground], np.float32) + light[..., None]).astype(np.float32)


def _mortar(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    course = y // 16
    return ((y % 16 < 2) | ((x + 16 * (course % 2)) % 32 < 2)).astype(np.float32)


def _ground(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    size = scene.side * PATCH
    row, column = rng.integers(0, _BANK - size, size=2)
    window = _bank(scene.ground)[row : row + size, column : column + size]
    if rng.random() < 0.5:
        window = window[:, ::-1]
    return window * rng.uniform(0.86, 1.1) + rng.normal(0, 5, 3)


def _clutter(ground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lines, arcs and specks in faint colours, over which things are drawn."""
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image, "RGBA")
    size = image.width
    for _ in range(int(rng.integers(20, 60) * (size / (GRID * PATCH)) ** 2) + 1):
        x, y = rng.uniform(0, size, 2)
        length, angle = rng.uniform(4, 46), rng.uniform(0, 2 * math.pi)
        color = (*rng.integers(0, 256, 3).tolist(), int(rng.integers(40, 130)))
        kind = rng.integers(3)
        if kind == 0:
            pen.line([x, y, x + length * math.cos(angle), y + length * math.sin(angle)], fill=color, width=2)
        elif kind == 1:
            start = math.degrees(angle)
            pen.arc([x, y, x + length, y + length], start, start + rng.uniform(60, 200), fill=color, width=2)
        else:
            radius = rng.uniform(1, 4)
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)
    return np.asarray(image)
