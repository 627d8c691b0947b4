"""What a scene is made of, and how one is drawn at random."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

PATCH = 14  # pixels a side
GRID = 24  # patches a side of a whole scene: 336 pixels, 576 patches, as in LLaVA-1.5

COLORS = {
    "red": (214, 38, 38),
    "orange": (244, 138, 24),
    "yellow": (247, 220, 40),
    "green": (30, 170, 60),
    "blue": (36, 84, 220),
    "purple": (140, 50, 176),
    "white": (245, 245, 245),
    "black": (24, 24, 24),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart", "moon")
PATTERNS = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": (28, 36), "large": (50, 64)}  # pixels across, both ends included
DIGITS = "0123456789"
LETTERS = "ABCDEFGHKLMNPRSTUXYZ"
CHARACTERS = LETTERS + DIGITS
SIGNS = ("circle", "square")  # shapes with room for a character
GROUNDS = ("grass", "sand", "water", "brick", "wood", "sky", "night", "snow")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")

# One shape in nine of every colour is kept out of training, to tell knowing parts from remembering wholes.
HELD_OUT = frozenset((color, SHAPES[(2 * i + 3) % len(SHAPES)]) for i, color in enumerate(COLORS))


@dataclass(frozen=True)
class Thing:
    """One object: centre in pixels of the whole 336 x 336 scene, diameter in pixels, rotation in degrees."""

    color: str
    shape: str
    pattern: str
    size: str
    character: str  # one of CHARACTERS, or "" for none
    x: float
    y: float
    diameter: int
    angle: int

    @property
    def row(self) -> str:
        return ROWS[min(int(self.y * 3 / (GRID * PATCH)), 2)]

    @property
    def column(self) -> str:
        return COLUMNS[min(int(self.x * 3 / (GRID * PATCH)), 2)]

    @property
    def is_held_out(self) -> bool:
        return (self.color, self.shape) in HELD_OUT


@dataclass(frozen=True)
class Scene:
    """Things on a ground, within a window of ``side`` x ``side`` patches whose corner is patch (left, top)."""

    ground: str
    things: tuple[Thing, ...]
    seed: int  # of clutter and noise
    side: int = GRID
    left: int = 0
    top: int = 0


def sample_scene(seed: str, *, training: bool, side: int = GRID) -> Scene:
    """The scene of a seed such as ``train/17``; a smaller ``side`` gives a window with as many things an area.

    Training scenes hold no combination of HELD_OUT.
    """
    rng = random.Random(seed)
    left, top = rng.randint(0, GRID - side), rng.randint(0, GRID - side)
    share = (side / GRID) ** 2
    count = rng.randint(max(2, round(8 * share)), max(3, round(16 * share)))
    things: list[Thing] = []
    for _ in range(12 * count):
        if len(things) == count:
            break
        thing = _sample_thing(rng, training)
        reach = thing.diameter / 2 + 2
        low, high = reach, side * PATCH - reach
        x, y = left * PATCH + rng.uniform(low, high), top * PATCH + rng.uniform(low, high)
        if all(max(abs(x - t.x), abs(y - t.y)) > reach + t.diameter / 2 for t in things):
            things.append(replace(thing, x=x, y=y))
    return Scene(rng.choice(GROUNDS), tuple(things), rng.getrandbits(32), side, left, top)


def _sample_thing(rng: random.Random, training: bool) -> Thing:
    while True:
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        if not (training and (color, shape) in HELD_OUT):
            break
    pattern, size, character = rng.choice(PATTERNS), rng.choice(list(SIZES)), ""
    if shape in SIGNS and rng.random() < 0.7:
        pattern, size, character = "plain", "large", rng.choice(CHARACTERS)
    diameter = rng.randrange(SIZES[size][0], SIZES[size][1] + 1, 2)
    return Thing(color, shape, pattern, size, character, 0.0, 0.0, diameter, rng.choice((-12, -6, 0, 6, 12)))
