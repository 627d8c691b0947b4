"""The held-out questions that every accuracy is measured on."""

from __future__ import annotations

import random
from dataclasses import dataclass

from scenes.questions import KINDS, Question, ask
from scenes.world import Scene, sample_scene

ASKED = len(KINDS)  # questions a scene, one of each kind


@dataclass(frozen=True)
class Item:
    """One question; ``held_out`` when it is about a combination of colour and shape that training never showed."""

    scene: Scene
    question: Question

    @property
    def held_out(self) -> bool:
        return any(self.scene.things[i].is_held_out for i in self.question.about)


def exam(count: int, split: str = "test") -> list[Item]:
    """The first ``count`` questions of a split (``test``, or ``check`` to choose a recipe by), kinds in turn."""
    items: list[Item] = []
    number = 0
    while len(items) < count:
        scene = sample_scene(f"{split}/{number}", training=False)
        rng = random.Random(f"{split}/questions/{number}")
        items += [Item(scene, ask(scene, rng, kind)) for kind in KINDS]
        number += 1
    return items[:count]


def conversations(count: int, turns: int, split: str = "test") -> list[list[Item]]:
    """One about each scene of ``exam(count, split)``, with its questions; every turn has as many of each kind."""
    items = exam(count, split)
    scenes = [items[i : i + ASKED] for i in range(0, count - count % ASKED, ASKED)]
    return [[scene[(number + turn) % ASKED] for turn in range(turns)] for number, scene in enumerate(scenes)]
