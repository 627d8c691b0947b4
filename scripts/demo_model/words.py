"""What each patch of a scene shows, as labels and as the words an ideal vision tower would say of it."""

from __future__ import annotations

import numpy as np

from scenes.draw import owners
from scenes.world import CHARACTERS, COLORS, COLUMNS, GRID, GROUNDS, PATCH, PATTERNS, ROWS, SHAPES, SIZES, Scene

# Label 0 is "none of these"; label i + 1 is the i-th word.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "pattern": PATTERNS,
    "size": tuple(SIZES),
    "character": tuple(CHARACTERS),
    "center": ("thing",),  # the patch with the centre of a thing, so that things can be counted
    "ground": GROUNDS,
    "row": ROWS,
    "column": COLUMNS,
}
OF_THINGS = ("color", "shape", "pattern", "size", "character", "row", "column")
COVERED = 0.2  # share of a patch that a thing must cover to be what the patch shows


def patch_labels(scene: Scene) -> np.ndarray:
    """int64 [side * side, 9]: one label for each of ATTRIBUTES.

    A patch says where the thing lies that it shows, so that any of its patches can answer for a thing.
    """
    side, count = scene.side, len(scene.things)
    owned = owners(scene).reshape(side, PATCH, side, PATCH).transpose(0, 2, 1, 3).reshape(side * side, -1)  # [P,196]
    cover = np.stack([(owned == i + 1).mean(1) for i in range(count)], 1)  # [P,T]
    shown = np.where(cover.max(1) >= COVERED, cover.argmax(1), -1)  # [P]
    centers = [int(t.y // PATCH - scene.top) * side + int(t.x // PATCH - scene.left) for t in scene.things]
    shown[centers] = np.arange(count)

    of_things = thing_labels(scene)
    row, column = np.divmod(np.arange(side * side), side)
    own = np.stack([(row + scene.top) * 3 // GRID, (column + scene.left) * 3 // GRID], 1) + 1

    is_thing, center = shown >= 0, list(ATTRIBUTES).index("center")  # "ground" comes behind it, row and column last
    labels = np.zeros((side * side, len(ATTRIBUTES)), dtype=np.int64)
    labels[is_thing, :center] = of_things[shown[is_thing], :center]
    labels[centers, center] = 1
    labels[~is_thing, center + 1] = GROUNDS.index(scene.ground) + 1
    labels[:, -2:] = np.where(is_thing[:, None], of_things[shown, -2:], own)
    return labels


def thing_labels(scene: Scene) -> np.ndarray:
    """int64 [T,7]: a label of each of OF_THINGS for every thing."""
    return np.array(
        [[ATTRIBUTES[a].index(getattr(t, a)) + 1 if getattr(t, a) else 0 for a in OF_THINGS] for t in scene.things]
    )


def scene_labels(scene: Scene) -> np.ndarray:
    """float32 [110]: which colour-shape pairs, characters and ground a scene holds; what CLS learns to say."""
    pairs = np.zeros((len(COLORS), len(SHAPES)), dtype=np.float32)
    characters = np.zeros(len(CHARACTERS), dtype=np.float32)
    for thing in scene.things:
        pairs[ATTRIBUTES["color"].index(thing.color), SHAPES.index(thing.shape)] = 1
        if thing.character:
            characters[CHARACTERS.index(thing.character)] = 1
    ground = np.zeros(len(GROUNDS), dtype=np.float32)
    ground[GROUNDS.index(scene.ground)] = 1
    return np.concatenate([pairs.ravel(), characters, ground])
