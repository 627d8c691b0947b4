"""Questions about a scene, each with the one right answer and the things it is about."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from scenes.world import (
    CHARACTERS,
    COLORS,
    COLUMNS,
    DIGITS,
    GRID,
    GROUNDS,
    HELD_OUT,
    PATCH,
    PATTERNS,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
)

NUMBERS = ("zero", "one", "two", "three", "four")
CLEAR = 48  # pixels by which one thing must lie above, or left of, another for the question to be asked
MARGIN = 10  # pixels that a thing must keep from a border between thirds for its place to be asked


@dataclass(frozen=True)
class Question:
    """``about`` indexes the things of the scene that decide the answer; empty for none or the ground."""

    kind: str
    text: str
    answer: str
    about: tuple[int, ...]

    @property
    def names_held_out(self) -> bool:
        """Whether it speaks of a combination of colour and shape that training scenes never show."""
        return any((color, shape) in HELD_OUT for color, shape in _NAMED.findall(self.text))


Asker = Callable[[Scene, random.Random], Question | None]


def ask(scene: Scene, rng: random.Random, kind: str | None = None) -> Question:
    """A question of a kind, or of a random one among those the scene allows. Every scene allows `ground`."""
    if kind is not None:
        for _ in range(20):
            if question := KINDS[kind](scene, rng):
                return question
    while True:
        if question := KINDS[rng.choice(list(KINDS))](scene, rng):
            return question


def _attribute(scene: Scene, rng: random.Random) -> Question | None:
    index = _any(scene, rng)
    thing = scene.things[index]
    asked = rng.choice(("color", "color", "shape", "shape", "pattern"))
    name = _name(scene, rng, index, hide=(asked,))
    if name is None:
        return None
    text = {
        "color": ("What color is {}?", "What is the color of {}?", "Which color does {} have?", "{} has what color?"),
        "shape": ("What shape is {}?", "What is the shape of {}?", "Which shape does {} have?"),
        "pattern": ("What pattern does {} have?", "What is the pattern of {}?", "Which pattern is on {}?"),
    }[asked]
    return Question("attribute", _said(rng.choice(text), name), getattr(thing, asked), (index,))


def _where(scene: Scene, rng: random.Random) -> Question | None:
    index = _any(scene, rng)
    thing = scene.things[index]
    third = GRID * PATCH / 3
    if any(abs(at - border) < MARGIN for at in (thing.x, thing.y) for border in (third, 2 * third)):
        return None
    name = _name(scene, rng, index)
    if name is None:
        return None
    text = rng.choice(("Where is {}?", "Where in the picture is {}?", "In which part of the image is {}?"))
    return Question("where", _said(text, name), f"{thing.row} {thing.column}", (index,))


def _existence(scene: Scene, rng: random.Random) -> Question | None:
    """Half yes, half no; a no differs in one part from a thing that is there."""
    present = rng.random() < 0.5
    for _ in range(20):
        words = _parts(scene.things[_any(scene, rng)])
        pair = rng.choice(
            (("color", "shape"), ("pattern", "shape"), ("color", "pattern"), ("size", "shape"), ("shape",))
        )
        wanted = {part: words[part] for part in pair}
        if not present:
            part = rng.choice(pair)
            wanted[part] = rng.choice(_VALUES[part])
        matches = _matching(scene, wanted)
        if bool(matches) == present:
            break
    else:
        return None
    text = rng.choice(("Is there {}?", "Is there {} in the picture?", "Can you see {}?", "Does the image show {}?"))
    return Question("existence", text.format(_with_article(_noun(wanted))), "yes" if present else "no", tuple(matches))


def _counting(scene: Scene, rng: random.Random) -> Question | None:
    count = rng.randrange(len(NUMBERS))
    for _ in range(10):
        pair = rng.choice((("shape",), ("color",), ("pattern", "shape"), ("color", "shape"), ("color", "pattern")))
        found = Counter(tuple(getattr(thing, part) for part in pair) for thing in scene.things)
        options = [values for values in itertools.product(*(_VALUES[part] for part in pair)) if found[values] == count]
        if options:
            break
    else:
        return None
    wanted = dict(zip(pair, rng.choice(options), strict=True))
    text = rng.choice(("How many {} are there?", "How many {} can you see?", "Count the {}."))
    about = tuple(_matching(scene, wanted))
    return Question("counting", text.format(_noun(wanted, plural=True)), NUMBERS[count], about)


def _comparison(scene: Scene, rng: random.Random) -> Question | None:
    if len(scene.things) < 2:
        return None
    first, second = rng.sample(range(len(scene.things)), 2)
    a, b = scene.things[first], scene.things[second]
    asked = rng.choice(("larger", "smaller", "higher", "lower", "left", "right"))
    if asked in ("larger", "smaller"):
        clear = a.size != b.size
        first_wins = (a.diameter > b.diameter) == (asked == "larger")
        hide = ("size",)
    elif asked in ("higher", "lower"):
        clear = abs(a.y - b.y) > CLEAR and a.row != b.row
        first_wins = (a.y < b.y) == (asked == "higher")
        hide = ()
    else:
        clear = abs(a.x - b.x) > CLEAR and a.column != b.column
        first_wins = (a.x < b.x) == (asked == "left")
        hide = ()
    names = _name(scene, rng, first, hide), _name(scene, rng, second, hide)
    if not clear or names[0] is None or names[1] is None:
        return None
    word = {"left": "further left", "right": "further right"}.get(asked, asked)
    text = rng.choice(("Which is {}, {} or {}?", "Which one is {}: {} or {}?"))
    answer = names[0] if first_wins else names[1]
    return Question("comparison", text.format(word, names[0], names[1]), answer, (first, second))


def _character(scene: Scene, rng: random.Random) -> Question | None:
    signs = [i for i, thing in enumerate(scene.things) if thing.character]
    if not signs:
        return None
    index = rng.choice(signs)
    name = _name(scene, rng, index, hide=("pattern", "size"))
    if name is None:
        return None
    character = scene.things[index].character
    what = rng.choice(("character", "digit" if character in DIGITS else "letter"))
    text = rng.choice((f"What {what} is on {{}}?", f"Which {what} is written on {{}}?", "What does {} say?"))
    return Question("character", _said(text, name), character, (index,))


def _ground(scene: Scene, rng: random.Random) -> Question | None:
    text = rng.choice(("What is in the background?", "What is the background?", "What lies behind the objects?"))
    return Question("ground", text, scene.ground, ())


KINDS: dict[str, Asker] = {
    "attribute": _attribute,
    "where": _where,
    "existence": _existence,
    "counting": _counting,
    "comparison": _comparison,
    "character": _character,
    "ground": _ground,
}

# --- names of things ---

_NAMED = re.compile(rf"\b({'|'.join(COLORS)}) (?:(?:{'|'.join(PATTERNS)}) )?({'|'.join(SHAPES)})")

_VALUES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "color": tuple(COLORS),
    "pattern": PATTERNS,
    "shape": SHAPES,
}
_SYNONYMS = {"small": ("small", "little"), "large": ("large", "big")}


def _parts(thing: Thing) -> dict[str, str]:
    return {part: getattr(thing, part) for part in _VALUES}


def _any(scene: Scene, rng: random.Random) -> int:
    return rng.randrange(len(scene.things))


def _matching(scene: Scene, wanted: dict[str, str]) -> list[int]:
    return [i for i, t in enumerate(scene.things) if all(getattr(t, part) == word for part, word in wanted.items())]


def _name(scene: Scene, rng: random.Random, index: int, hide: tuple[str, ...] = ()) -> str | None:
    """``the large red star``: parts that together fit only this thing, as few as will do or one more."""
    words = _parts(scene.things[index])
    shown = [part for part in _VALUES if part not in hide]
    for count in range(1, len(shown) + 1):
        fitting = [
            parts
            for parts in itertools.combinations(shown, count)
            if _matching(scene, {part: words[part] for part in parts}) == [index]
        ]
        if fitting:
            parts = rng.choice(fitting)
            if rng.random() < 0.3:
                parts = tuple(p for p in shown if p in {*parts, rng.choice(shown)})
            return "the " + _noun({part: _spoken(words[part], rng) for part in parts})
    return None


def _spoken(word: str, rng: random.Random) -> str:
    return rng.choice(_SYNONYMS.get(word, (word,)))


def _noun(words: dict[str, str], plural: bool = False) -> str:
    adjectives = [words[part] for part in ("size", "color", "pattern") if part in words]
    shape = words.get("shape", "thing")
    ending = "" if not plural else "es" if shape == "cross" else "s"
    return " ".join([*adjectives, shape + ending])


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _said(template: str, name: str) -> str:
    text = template.format(name)
    return text[0].upper() + text[1:]


NOUNS = tuple(_noun({"shape": shape}, plural) for shape in (*SHAPES, "thing") for plural in (False, True))


def vocabulary() -> list[str]:
    """Every word that names something, for a tokenizer to keep whole."""
    synonyms = [word for words in _SYNONYMS.values() for word in words]
    shapes = [*SHAPES, *(_noun({"shape": shape}, plural=True) for shape in SHAPES)]
    return [*COLORS, *shapes, *PATTERNS, *synonyms, *CHARACTERS, *GROUNDS, *ROWS, *COLUMNS, *NUMBERS, "thing", "things"]
