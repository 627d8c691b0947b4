"""Which regular expressions may split a prompt into words: those that take time by the length of the text alone.

The tokenizer's engine backtracks. A pattern such as `(a+)+b` takes it exponential time, `a+b` quadratic time on a text
of many a; both may come with a tokenizer.json. What published tokenizers need is little: branches of single characters
and classes, each with a quantifier. A branch is linear if nothing after its first unbounded repeat can fail. Where
something can, as in `\\s*[\\r\\n]+`, the next branch must repeat the same class, as `\\s+` does: what the first looked
at in vain, the second consumes, so that no character is looked at again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LENGTH = 4096  # characters; published patterns have up to 500
MAX_BRANCHES = 64
MAX_COUNT = 16  # of `{m,n}`
MAX_WAYS = 256  # to match what precedes the first unbounded repeat; `(?i:'s|'t|...)?` has 8
_MANY = 1 << 30

_QUANTIFIER = re.compile(r"(?:([*+?])(\+?)|\{(\d{1,2})(?:(,)(\d{0,2}))?\})")
_ESCAPE = re.compile(r"\\(?:[rntfvsSdDwW]|[pP]\{\^?[A-Za-z_]{1,40}\}|[^0-9A-Za-z])")
_CLASS = re.compile(r"\[\^?(?:[^\\\[\]&]|&(?!&)|\\(?:[rntfvsSdDwW]|[pP]\{\^?[A-Za-z_]{1,40}\}|[^0-9A-Za-z]))+\]")
_OPENING = re.compile(r"\(\?(i?:|!|=)")


@dataclass(frozen=True)
class _Element:
    """A character, class, group or lookahead with its quantifier; ``ways`` is how many alternatives a group has."""

    text: str
    low: int = 1
    high: int = 1
    ways: int = 1
    looks: bool = False

    @property
    def can_fail(self) -> bool:
        return self.low > 0 or self.looks


def check_pattern(pattern: str) -> None:
    """Raises ValueError, with the reason, unless a regular expression is one that splits in linear time."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"{len(pattern):,} characters, over the limit of {MAX_LENGTH:,}")
    branches, _ = _branches(pattern, 0, in_group=False)
    if len(branches) > MAX_BRANCHES:
        raise ValueError(f"{len(branches)} branches, over the limit of {MAX_BRANCHES}")
    for number, branch in enumerate(branches):
        _check_branch(branch, branches[number + 1] if number + 1 < len(branches) else None)


def _check_branch(branch: list[_Element], following: list[_Element] | None) -> None:
    text = "".join(element.text for element in branch)
    if not any(element.low for element in branch):
        raise ValueError(f"branch {text[:40]!r} may match nothing")
    before, repeat, after = _at_first_repeat(branch)
    ways = 1
    for element in before if repeat is None else [*before, *after[:1]]:
        ways *= element.ways * (1 if element.high == _MANY else element.high - element.low + 1)
    if ways > MAX_WAYS:
        raise ValueError(f"branch {text[:40]!r} has {ways} ways to match, over the limit of {MAX_WAYS}")
    failing = [element for element in after if element.can_fail]
    if repeat is None or not failing:
        return
    if failing != after[:1]:
        raise ValueError(f"branch {text[:40]!r} goes on after repeats that it may have to take back")
    next_before, next_repeat, _ = _at_first_repeat(following or [])
    if next_repeat is None or (next_before, next_repeat.text) != (before, repeat.text):
        raise ValueError(
            f"branch {text[:40]!r} may repeat {repeat.text[:40]} in vain, and the next does not consume it"
        )


def _at_first_repeat(branch: list[_Element]) -> tuple[list[_Element], _Element | None, list[_Element]]:
    """What precedes the first unbounded repeat, that repeat, and what follows it."""
    for number, element in enumerate(branch):
        if element.high == _MANY:
            return branch[:number], element, branch[number + 1 :]
    return branch, None, []


def _branches(pattern: str, at: int, *, in_group: bool) -> tuple[list[list[_Element]], int]:
    """The branches from a position on, up to the end or to the parenthesis that closes the group."""
    branches: list[list[_Element]] = [[]]
    while at < len(pattern):
        if pattern[at] == ")" and in_group:
            return branches, at + 1
        if pattern[at] == "|":
            branches.append([])
            at += 1
            continue
        element, at = _element(pattern, at, in_group)
        branches[-1].append(element)
    if in_group:
        raise ValueError("a group without an end")
    return branches, at


def _element(pattern: str, at: int, in_group: bool) -> tuple[_Element, int]:
    start = at
    ways = 1
    opening = _OPENING.match(pattern, at)
    if opening and not in_group:
        inner, at = _branches(pattern, opening.end(), in_group=True)
        ways = len(inner)
        if opening[1] in ("!", "="):
            return _Element(pattern[start:at], ways=ways, looks=True), at
    else:
        at = _end_of_atom(pattern, at)
    text = pattern[start:at]
    low, high, at = _quantifier(pattern, at)
    if (low, high) != (1, 1) and (in_group or (opening and (low, high) != (0, 1))):
        raise ValueError(f"a repeat in or of the group at {pattern[start : start + 40]!r}")
    return _Element(text, low, high, ways), at


def _end_of_atom(pattern: str, at: int) -> int:
    for known in (_CLASS, _ESCAPE):
        if found := known.match(pattern, at):
            return found.end()
    if pattern[at] in r"\[](){}*+?^$":
        raise ValueError(f"unknown syntax at {pattern[at : at + 40]!r}")
    return at + 1


def _quantifier(pattern: str, at: int) -> tuple[int, int, int]:
    """How often the atom before a position may occur, at least and at most, and where the pattern goes on."""
    found = _QUANTIFIER.match(pattern, at)
    if not found:
        return 1, 1, at
    if pattern[found.end() : found.end() + 1] in tuple("*+?{"):
        raise ValueError(f"unknown syntax at {pattern[at : at + 40]!r}")
    if found[1]:
        return int(found[1] == "+"), 1 if found[1] == "?" else _MANY, found.end()
    low = int(found[3])
    high = low if not found[4] else int(found[5]) if found[5] else _MANY
    if not low <= high or max(low, high if high != _MANY else 0) > MAX_COUNT or high == 0:
        raise ValueError(f"a count beyond {MAX_COUNT} at {pattern[at : at + 40]!r}")
    return low, high, found.end()
