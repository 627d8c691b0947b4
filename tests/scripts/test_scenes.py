"""The visual world of the demo model: scenes are repeatable, questions have one right answer, splits stay apart."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest

from demo_model.words import ATTRIBUTES, patch_labels, scene_labels
from scenes.draw import draw, owners
from scenes.exam import conversations, exam
from scenes.questions import KINDS, NUMBERS, ask
from scenes.world import COLORS, GRID, PATCH, PATTERNS, SHAPES, SIZES, Scene, Thing, sample_scene

SYNONYMS = {"little": "small", "big": "large"}


def matching(scene: Scene, phrase: str) -> list[int]:
    """The things a noun phrase fits, read from its words alone."""
    words = [SYNONYMS.get(word, word) for word in phrase.split() if word not in ("the", "a", "an")]
    nouns = {"thing", "things"}
    singular = [next((s for s in SHAPES if word in (s, s + "s", s + "es")), word) for word in words]
    wanted = [word for word in singular if word not in nouns]
    assert wanted, phrase
    return [
        i for i, t in enumerate(scene.things) if all(word in (t.size, t.color, t.pattern, t.shape) for word in wanted)
    ]


ADJECTIVES = "|".join((*SIZES, *SYNONYMS, *COLORS, *PATTERNS))
NOUN = rf"((?:the|an?) (?:(?:{ADJECTIVES}) )*(?:{'|'.join(SHAPES)}|thing))"


def expected(scene: Scene, text: str) -> str:
    """The answer, worked out from the question's words and the scene by other code than that which asked."""
    low = text.lower()
    if "background" in low or "behind" in low:
        return scene.ground
    if low.startswith(("how many", "count")):
        phrase = re.sub(r"^(how many|count the) | are there\?| can you see\?|\.$", "", low)
        return NUMBERS[len(matching(scene, phrase))]
    phrases = re.findall(NOUN, low)
    if low.startswith(("is there", "can you see", "does the image show")):
        return "yes" if matching(scene, phrases[0]) else "no"
    if low.startswith("which is ") or low.startswith("which one is "):
        (a,), (b,) = matching(scene, phrases[-2]), matching(scene, phrases[-1])
        first, second = scene.things[a], scene.things[b]
        key = {
            "larger": lambda t: t.diameter,
            "smaller": lambda t: -t.diameter,
            "higher": lambda t: -t.y,
            "lower": lambda t: t.y,
            "left": lambda t: -t.x,
            "right": lambda t: t.x,
        }[re.search(r"larger|smaller|higher|lower|left|right", low)[0]]
        return phrases[-2] if key(first) > key(second) else phrases[-1]
    (index,) = matching(scene, phrases[0])
    thing: Thing = scene.things[index]
    if low.startswith(("where", "in which part")):
        return f"{thing.row} {thing.column}"
    for asked in ("color", "shape", "pattern"):
        if asked in low:
            return getattr(thing, asked)
    return thing.character


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right_and_unique(kind: str) -> None:
    for number in range(150):
        scene = sample_scene(f"unit/{number}", training=bool(number % 2), side=(GRID, 16, 12)[number % 3])
        question = ask(scene, random.Random(number), kind)
        assert question.answer == expected(scene, question.text), (question, scene)


def test_every_kind_is_asked_and_no_constant_answer_goes_far() -> None:
    items = exam(1400)
    kinds = Counter(item.question.kind for item in items)
    assert min(kinds[kind] for kind in KINDS) > 0.1 * len(items)
    assert Counter(item.question.answer for item in items).most_common(1)[0][1] < 0.3 * len(items)
    yes = Counter(item.question.answer for item in items if item.question.kind == "existence")
    assert 0.4 < yes["yes"] / (yes["yes"] + yes["no"]) < 0.6
    assert {item.question.text.split()[0] for item in items} >= {"What", "Which", "Where", "Is", "How"}


def test_held_out_combinations_are_in_tests_and_never_in_training() -> None:
    training = [t for n in range(200) for t in sample_scene(f"train/{n}", training=True).things]
    assert not any(thing.is_held_out for thing in training)
    assert {t.color for t in training} == set(COLORS)
    assert {t.shape for t in training} == set(SHAPES)
    assert {t.pattern for t in training} == set(PATTERNS)
    assert sum(item.held_out for item in exam(1400)) > 100


def test_scenes_repeat_and_splits_differ() -> None:
    assert sample_scene("test/3", training=False) == sample_scene("test/3", training=False)
    scene = sample_scene("test/3", training=False)
    assert np.array_equal(draw(scene), draw(scene))
    seeds = {item.scene.seed for split in ("test", "check") for item in exam(140, split)}
    assert len(seeds) == 40
    assert exam(70) == exam(140)[:70]


@pytest.mark.parametrize("side", [6, 12, GRID])
def test_things_lie_apart_and_inside(side: int) -> None:
    for number in range(40):
        scene = sample_scene(f"unit/{number}", training=True, side=side)
        if side == GRID:
            assert 8 <= len(scene.things) <= 16
        for i, thing in enumerate(scene.things):
            reach = thing.diameter / 2
            assert scene.left * PATCH <= thing.x - reach
            assert thing.x + reach <= (scene.left + side) * PATCH
            assert scene.top * PATCH <= thing.y - reach
            assert thing.y + reach <= (scene.top + side) * PATCH
            for other in scene.things[:i]:
                gap = max(abs(thing.x - other.x), abs(thing.y - other.y))
                assert gap > reach + other.diameter / 2


def test_pixels_show_the_things_where_they_are() -> None:
    """The colour under a plain disc is its colour, on every ground."""
    for number in range(60):
        scene = sample_scene(f"unit/{number}", training=True)
        image, owned = draw(scene), owners(scene)
        assert image.shape == (GRID * PATCH, GRID * PATCH, 3)
        assert image.dtype == np.uint8
        assert set(np.unique(owned)) == set(range(len(scene.things) + 1))
        for i, thing in enumerate(scene.things):
            if thing.pattern == "plain" and not thing.character:
                shown = np.median(image[owned == i + 1].astype(float), axis=0)
                nearest = min(COLORS, key=lambda c: np.abs(shown - COLORS[c]).sum())
                assert nearest == thing.color, (shown, thing)


def test_patch_labels_tell_what_a_patch_shows() -> None:
    names = list(ATTRIBUTES)
    for number in range(20):
        scene = sample_scene(f"unit/{number}", training=True, side=(12, GRID)[number % 2])
        labels, owned = patch_labels(scene), owners(scene)
        assert labels.shape == (scene.side**2, len(names))
        centers = np.flatnonzero(labels[:, names.index("center")])
        assert len(centers) == len(scene.things)
        for patch in range(0, scene.side**2, 7):
            row, column = divmod(patch, scene.side)
            window = owned[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            counts = np.bincount(window.ravel(), minlength=len(scene.things) + 1)[1:]
            said = {name: labels[patch, a] and ATTRIBUTES[name][labels[patch, a] - 1] for a, name in enumerate(names)}
            if counts.max() >= 0.2 * PATCH**2:
                thing = scene.things[counts.argmax()]
                assert (said["color"], said["shape"], said["pattern"], said["size"]) == (
                    thing.color, thing.shape, thing.pattern, thing.size,
                )  # fmt: skip
                assert (said["row"], said["column"]) == (thing.row, thing.column)
                assert said["ground"] == 0
            elif patch not in centers:
                assert said["ground"] == scene.ground
                assert said["color"] == 0
        assert scene_labels(scene).sum() == len({(t.color, t.shape) for t in scene.things}) + 1 + len(
            {t.character for t in scene.things if t.character}
        )


def test_every_turn_of_conversations_asks_each_kind_as_often() -> None:
    items = exam(70)
    talks = conversations(70, 4)
    assert [{item.scene.seed for item in talk} for talk in talks] == [{item.scene.seed} for item in items[::7]]
    assert all(len({item.question.text for item in talk}) == 4 and set(talk) <= set(items) for talk in talks)
    for turn in zip(*conversations(7 * 7, 4), strict=True):
        assert len({items.index(item) % 7 for item in turn}) == 7
