"""What a chat template may do with values while it renders, and what that costs: limits, operators and methods.

Whatever takes longer for longer values is charged by their size, before it is done where it multiplies sizes. The
lists say what is allowed, which is what chat templates use: what is not in them cannot multiply anything.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
from jinja2.runtime import LoopContext, Undefined
from jinja2.utils import Namespace

MAX_STEPS = 2_000_000  # a render; published templates take up to 400,000 for 500 messages, and a step up to 0.5 us
MAX_SECONDS = 2.0  # a render; for machines, and operations, that take longer
MAX_TEXT = 1_000_000  # characters of one string, and of the prompt; the processor takes 400,000
MAX_ITEMS = 100_000  # of one list, with all that is in it
MAX_DEPTH = 50  # of macros in macros, which Python's stack would end at 150, and of lists in lists
MAX_INTEGER = 10**15  # larger ones are slow to multiply and print, and can be made to collide as keys
MAX_ARGUMENT = 100  # characters to strip or to search from the right: Python does both in quadratic time
MAX_WIDTH = 1000  # of an indentation and of a formatted number; characters of a format or a number in text

CHARACTERS_A_STEP = 16  # so MAX_STEPS makes at most 32 million characters, 128 MB of them
STEPS_AN_ITEM = 2  # a list's entry with its string takes up to 84 bytes


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TEXT_METHODS = words(
    """capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace
    istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip
    split splitlines startswith strip swapcase title upper"""
)
_QUADRATIC_METHODS = words("lstrip rfind rindex rpartition rsplit rstrip strip")
_DICT_METHODS = words("copy get items keys values")
_LOOP_ATTRIBUTES = words(
    "changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"
)
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_SCALARS = (str, int, float, type(None), Undefined)
_PERCENT = re.compile(r"%(?:\(\w*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?")


class TooMuchWork(jinja2.TemplateRuntimeError):
    """A template went beyond a limit; the message says which."""


class Meter:
    """What one render has cost so far. Raises TooMuchWork where that, or a size it is told, is beyond a limit."""

    __slots__ = ("_check_at", "_deadline", "depth", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.depth = 0
        self._check_at = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def charge(self, steps: int) -> None:
        self.steps += steps
        if self.steps >= self._check_at:
            if self.steps > MAX_STEPS:
                raise TooMuchWork(f"limit {MAX_STEPS:,} steps")
            if time.monotonic() > self._deadline:
                raise TooMuchWork(f"limit {MAX_SECONDS:g} seconds")
            self._check_at = self.steps + 1000

    def charge_text(self, characters: int) -> None:
        if characters > MAX_TEXT:
            raise TooMuchWork(f"limit {MAX_TEXT:,} characters of text")
        self.charge(1 + characters // CHARACTERS_A_STEP)

    def charge_list(self, items: int) -> None:
        if items > MAX_ITEMS:
            raise TooMuchWork(f"limit {MAX_ITEMS:,} items of a list")
        self.charge(1 + items * STEPS_AN_ITEM)

    def weigh(self, *values: Any) -> tuple[int, int, int]:
        """Charge for values with all that is in them: how many items, of how many characters, nested how deep.

        What is in a list twice counts twice: to print or compare it is to go through it twice.
        """
        level = list(values)
        items = len(level)
        total = depth = 0
        while level:
            inner: list[Any] = []
            characters = 0
            for value in level:
                if isinstance(value, str):
                    characters += len(value)
                    continue
                for part in _parts(value):
                    items += len(part)
                    if items > MAX_ITEMS:
                        raise TooMuchWork(f"limit {MAX_ITEMS:,} items of a list with all that is in it")
                    inner.extend(part)
            self.charge(len(level))
            self.charge_text(characters)
            total += characters
            level = inner
            depth += 1
            if depth > MAX_DEPTH:
                raise TooMuchWork(f"limit {MAX_DEPTH} lists in lists")
        return items, total, depth

    def text(self, value: Any) -> str:
        """A value as Jinja prints it, and charged as such; marked as safe if it was."""
        if not isinstance(value, str):
            self.weigh(value)
            value = str(value)
        self.charge_text(len(value))
        return value

    def each(self, value: Any, steps: int = STEPS_AN_ITEM) -> Any:
        """The same items to iterate over, at so many steps each; charged at once where their number is known."""
        try:
            items = len(value)
        except TypeError:
            return self._each(iter(value), steps)
        self.charge(items * steps)
        return value

    def _each(self, items: Iterator[Any], steps: int) -> Iterator[Any]:
        for item in items:
            self.charge(steps)
            yield item

    def items(self, value: Any) -> list[Any]:
        """A list of what there is to iterate over."""
        found = []
        for item in self.each(value):
            found.append(item)
            if len(found) > MAX_ITEMS:
                raise TooMuchWork(f"limit {MAX_ITEMS:,} items of a list")
        return found


def _parts(value: Any) -> tuple[Any, ...]:
    """What a value holds, as iterables of known length."""
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    if isinstance(value, dict):
        return value.keys(), value.values()
    return (value,) if isinstance(value, (list, tuple, *_VIEWS)) else ()


def is_nested(value: Any) -> bool:
    return not isinstance(value, _SCALARS)


def refuse_nested(*values: Any) -> None:
    """Keys, names and options are plain: to hash or print a list of lists of lists can take for ever."""
    for value in values:
        if is_nested(value):
            raise TypeError(f"expected a name or a number, found a {type(value).__name__}")


def _refuse_long(*values: Any) -> None:
    if any(isinstance(value, str) and len(value) > MAX_ARGUMENT for value in values):
        raise TooMuchWork(f"limit {MAX_ARGUMENT} characters of an argument")


def check_options(*values: Any) -> None:
    refuse_nested(*values)
    _refuse_long(*values)
    if any(isinstance(value, int) and abs(value) > MAX_WIDTH for value in values):
        raise TooMuchWork(f"limit {MAX_WIDTH} of an argument")


# --- operators and methods -------------------------------------------------------------------------------------------


def operate(meter: Meter, sign: str, apply: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """``left sign right`` for an operator of arithmetic."""
    if isinstance(left, _VIEWS) or isinstance(right, _VIEWS):  # sets, to Python
        raise TypeError(f"no {sign} for {type(left).__name__} and {type(right).__name__}")
    if isinstance(left, str) or isinstance(right, str):
        if sign == "+" and isinstance(left, str) and isinstance(right, str):
            meter.charge_text((len(left) + len(right)) * escaping(left, right))
        elif sign == "*":
            meter.charge_text(_product(left, right))
        elif sign == "%" and isinstance(left, str):
            return percent(meter, left, right)
    elif isinstance(left, (list, tuple)) or isinstance(right, (list, tuple)):
        if sign == "+" and isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
            meter.charge_list(len(left) + len(right))
        elif sign == "*":
            meter.charge_list(_product(left, right))
    elif sign == "**" and isinstance(right, int) and abs(right) > 64:
        raise TooMuchWork("limit 64 of an exponent")
    return as_number(apply(left, right))


def call_method(meter: Meter, method: Any, *args: Any, **kwargs: Any) -> Any:
    """A method that ``is_safe`` let through."""
    owner, name = method.__self__, method.__name__
    if isinstance(owner, (dict, LoopContext)):
        meter.weigh(*args, *kwargs.values())
        return method(*args, **kwargs)
    if not isinstance(owner, str):
        raise TypeError(f"{name} cannot be called")
    meter.charge_text(len(owner))
    if name == "replace":
        return replace(meter, owner, *args, **kwargs)
    if name == "join":
        return join(meter, owner, meter.items(*args))
    if name in _QUADRATIC_METHODS:
        _refuse_long(*args, *kwargs.values())
    result = method(*args, **kwargs)
    if isinstance(result, str):
        meter.charge_text(len(result))
    elif isinstance(result, list):
        meter.charge_list(len(result))
    return result


def is_safe(owner: Any, attribute: str) -> bool:
    """Whether a template may use an attribute that Python has: the methods above, not those of lists or numbers."""
    if isinstance(owner, str):
        return attribute in _TEXT_METHODS
    if isinstance(owner, dict):
        return attribute in _DICT_METHODS
    if isinstance(owner, LoopContext):
        return attribute in _LOOP_ATTRIBUTES
    return isinstance(owner, Namespace) and not attribute.startswith("_")


def escaping(*texts: str) -> int:
    """By how much a text may grow: what is marked as safe escapes what it is joined with, `"` to `&#34;`."""
    return 1 if all(type(text) is str for text in texts) else 5


def _product(left: Any, right: Any) -> int:
    """The length of a string or list times a number; 0 for other operands, which Python refuses."""
    value, times = (right, left) if isinstance(left, int) else (left, right)
    return len(value) * max(0, times) if isinstance(times, int) and isinstance(value, (str, list, tuple)) else 0


def as_number(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise TooMuchWork(f"limit {MAX_INTEGER:,} of a number")
    return value


def percent(meter: Meter, text: str, values: Any) -> str:
    if len(text) > MAX_WIDTH:
        raise TooMuchWork(f"limit {MAX_WIDTH} characters of a format")
    widths = [width for pair in _PERCENT.findall(text) for width in pair if width]
    if any(width == "*" or int(width) > MAX_WIDTH for width in widths):
        raise TooMuchWork(f"limit {MAX_WIDTH} of the width of a format")
    _, characters, _ = meter.weigh(values)
    times = text.count("%") if isinstance(values, dict) else 1  # a named value may be put in more than once
    meter.charge_text((sum(map(int, widths)) + characters * times) * escaping(text))
    result = text % values
    meter.charge_text(len(result))
    return result


def replace(meter: Meter, text: str, old: str, new: str, count: int = -1) -> str:
    found = text.count(old) if count < 0 else min(text.count(old), count)
    growth = escaping(text)
    meter.charge_text(len(text) + found * max(0, len(new) * growth - len(old)))
    return text.replace(old, new, count)


def join(meter: Meter, separator: str, items: list[Any]) -> str:
    characters = sum(len(item) for item in items if isinstance(item, str)) + len(separator) * len(items)
    meter.charge_text(characters * escaping(separator))
    return separator.join(items)
