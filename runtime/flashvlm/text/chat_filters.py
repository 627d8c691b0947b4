"""The filters, tests and functions of chat templates, each charging for what it does.

They are those that published templates use, and whatever Jinja has that takes the same time for any value.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2.filters import FILTERS
from jinja2.runtime import Undefined
from jinja2.tests import TESTS
from jinja2.utils import Namespace, pass_context

from flashvlm.text.chat_meter import (
    MAX_ARGUMENT,
    MAX_ITEMS,
    MAX_WIDTH,
    Meter,
    TooMuchWork,
    as_number,
    check_options,
    escaping,
    join,
    percent,
    refuse_nested,
    replace,
    words,
)

# Names that no template can write, for the filters that counting puts in.
EACH, ENTER, CONCAT, COMPARED, SEARCHED, KEY, SLICE = (f"{n} (counted)" for n in ("for", "macro", *"~=?:["))

_STEPS_A_CALL = 8  # of a filter or test for each item, by name
_STEPS_A_SORT = 16  # comparisons for each of MAX_ITEMS
# Between the % of a date there is text, and after them one letter: no width, which strftime would fill.
_DATE = re.compile(r"(?:[^%]|%-?[A-Za-z%]){0,100}")


# --- filters ---------------------------------------------------------------------------------------------------------


def _of_text(function: Any) -> Callable[..., str]:
    """A filter that takes time by the length of the text it is given, and makes as much."""

    @pass_context
    def counted(context: Any, value: Any, /, *args: Any, **kwargs: Any) -> str:
        check_options(*args, *kwargs.values())
        result = function(context.meter.text(value), *args, **kwargs)
        context.meter.charge_text(len(result))
        return result

    return counted


def _of_number(function: Any, *, from_text: bool = False) -> Callable[..., Any]:
    """A filter or test that takes a number, or what says one; ``'a' * 10**precision`` is what ``round`` would do."""

    def counted(value: Any, /, *args: Any, **kwargs: Any) -> Any:
        if from_text:
            refuse_nested(*args, *kwargs.values())
            value = value[: MAX_WIDTH + 1] if isinstance(value, str) else value  # longer than any number
        else:
            check_options(*args, *kwargs.values())
            if isinstance(value, str):
                raise TypeError("expected a number, found text")
        return as_number(function(value, *args, **kwargs))

    return counted


def _of_all(name: str, *, environment: bool = True) -> Callable[..., Any]:
    """A filter that looks at all items at once, to compare or hash them."""
    function = FILTERS[name]

    @pass_context
    def counted(context: Any, value: Any, /, *args: Any, **kwargs: Any) -> Any:
        check_options(*args, *kwargs.values())
        items = value if isinstance(value, dict) else context.meter.items(value)
        context.meter.weigh(items)
        context.meter.charge(len(items) * _STEPS_A_SORT)
        first = (context.environment, items) if environment else (items,)
        result = function(*first, *args, **kwargs)
        return iter(list(result)) if isinstance(result, Iterator) else result

    return counted


def _of_each(name: str, names: int) -> Callable[..., Any]:
    """A filter that applies a named filter or test to each item; ``names``: how many arguments are names.

    Jinja's own are generators, to be iterated over once as this is; but generators of generators, 100,000 deep, are
    freed by as many nested calls, which overflows the stack of the process.
    """
    function = FILTERS[name]

    @pass_context
    def counted(context: Any, value: Any, /, *args: Any, **kwargs: Any) -> Any:
        check_options(*args[:names], kwargs.get("attribute"))
        return iter(context.meter.items(function(context, context.meter.each(value, _STEPS_A_CALL), *args, **kwargs)))

    return counted


@pass_context
def _joined(context: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    meter = context.meter
    if attribute is not None:
        value = FILTER_TABLE["map"](context, value, attribute=attribute)
    return join(meter, str(meter.text(d)), [str(meter.text(item)) for item in meter.items(value)])


@pass_context
def _replaced(context: Any, s: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = (str(context.meter.text(value)) for value in (s, old, new))
    return replace(context.meter, text, old, new, -1 if count is None else count)


@pass_context
def _indented(context: Any, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = context.meter.text(s)
    check_options(width)
    space = len(width) if isinstance(width, str) else width
    context.meter.charge_text((len(text) + (len(text.splitlines()) + 1) * max(0, space)) * escaping(text))
    return FILTERS["indent"](text, width, first, blank)


@pass_context
def _tojson(
    context: Any,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Not Jinja's own filter, which escapes <, > and & for HTML."""
    between = tuple(separators)[:3] if isinstance(separators, (list, tuple)) else separators
    check_options(indent, *(between or ()))
    items, characters, depth = context.meter.weigh(value)
    space = len(indent) if isinstance(indent, str) else indent or 0
    width = max(0, space) * depth + sum(map(len, between or ()))
    context.meter.charge_text(characters + items * width)
    result = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=between, sort_keys=bool(sort_keys))
    context.meter.charge_text(len(result))
    return result


@pass_context
def _formatted(context: Any, value: Any, *args: Any, **kwargs: Any) -> str:
    return percent(context.meter, context.meter.text(value), kwargs or args)


@pass_context
def _listed(context: Any, value: Any) -> list[Any]:
    return context.meter.items(value)


@pass_context
def _reversed(context: Any, value: Any) -> Any:
    if isinstance(value, str):
        context.meter.charge_text(len(value))
        return value[::-1]
    return iter(context.meter.items(value)[::-1])


@pass_context
def _pairs(context: Any, value: Any) -> Any:
    return iter(context.meter.items(FILTERS["items"](value)))


@pass_context
def _each(context: Any, value: Any, steps: int) -> Any:
    return context.meter.each(value, steps)


@pass_context
def _enter(context: Any, steps: int) -> str:
    context.meter.charge(steps)
    return ""


@pass_context
def _concatenated(context: Any, values: tuple[Any, ...]) -> str:
    texts = [str(context.meter.text(value)) for value in values]
    context.meter.charge_text(sum(map(len, texts)))
    return "".join(texts)


@pass_context
def _compared(context: Any, value: Any) -> Any:
    context.meter.weigh(value)
    return value


@pass_context
def _searched(context: Any, value: Any) -> Any:
    """What ``in`` looks into: all of it, but for a dictionary."""
    if not isinstance(value, dict):
        context.meter.weigh(value)
    return value


def _keyed(value: Any) -> Any:
    refuse_nested(value)
    return value


@pass_context
def _sliced(context: Any, value: Any, start: Any, stop: Any, step: Any) -> Any:
    refuse_nested(start, stop, step)
    if isinstance(value, Undefined):
        return value[start]  # raises what is undefined
    if not isinstance(value, (str, list, tuple, range)):
        raise TypeError(f"{type(value).__name__} has no slices")
    result = value[start:stop:step]
    if isinstance(result, str):
        context.meter.charge_text(len(result))
    else:
        context.meter.charge_list(len(result))
    return result


@pass_context
def printed(context: Any, value: Any) -> str:
    """What stands in double braces, as text."""
    if type(value) is str:
        context.meter.charge_text(len(value))
        return value
    return str(context.meter.text(value))


FILTER_TABLE: dict[str, Any] = {
    # These take the same time whatever they are given.
    **{name: FILTERS[name] for name in ("count", "d", "default", "first", "last", "length")},
    **{name: _of_text(FILTERS[name]) for name in words("capitalize e escape lower safe string title trim upper")},
    **{name: _of_number(FILTERS[name]) for name in ("abs", "round")},
    **{name: _of_number(FILTERS[name], from_text=True) for name in ("float", "int")},
    **{name: _of_all(name) for name in ("max", "min", "sort", "unique")},
    **{name: _of_each(name, 1) for name in ("map", "reject", "select")},
    **{name: _of_each(name, 2) for name in ("rejectattr", "selectattr")},
    "dictsort": _of_all("dictsort", environment=False),
    "format": _formatted,
    "indent": _indented,
    "items": _pairs,
    "join": _joined,
    "list": _listed,
    "replace": _replaced,
    "reverse": _reversed,
    "tojson": _tojson,
    EACH: _each,
    ENTER: _enter,
    CONCAT: _concatenated,
    COMPARED: _compared,
    SEARCHED: _searched,
    KEY: _keyed,
    SLICE: _sliced,
}


# --- tests and functions ---------------------------------------------------------------------------------------------


def _comparing(function: Any) -> Callable[..., bool]:
    @pass_context
    def counted(context: Any, value: Any, other: Any) -> bool:
        context.meter.weigh(value, other)
        return bool(function(value, other))

    return counted


def _range(meter: Meter, *args: Any) -> range:
    refuse_nested(*args)
    found = range(*map(as_number, args))
    if len(found) > MAX_ITEMS:
        raise TooMuchWork(f"limit {MAX_ITEMS:,} items of a range")
    return found


def _dict(meter: Meter, *args: Any, **kwargs: Any) -> dict[Any, Any]:
    if args and not isinstance(args[0], dict):
        args = (meter.items(args[0]), *args[1:])
    meter.weigh(*args, kwargs)
    return dict(*args, **kwargs)


def _namespace(meter: Meter, *args: Any, **kwargs: Any) -> Namespace:
    return Namespace(_dict(meter, *args, **kwargs))


def _raise_exception(meter: Meter, message: Any) -> None:
    raise jinja2.TemplateError(str(meter.text(message)))


def _strftime_now(meter: Meter, format: str) -> str:
    if not _DATE.fullmatch(format):
        raise ValueError(f"expected a date format of letters such as '%d %B %Y', found {format[:MAX_ARGUMENT]!r}")
    return datetime.now().strftime(format)


_FIXED_TESTS = words(
    "boolean callable defined false float integer iterable mapping none number sameas sequence string true undefined"
)
_COMPARISONS = words("!= < <= == > >= eq equalto ge greaterthan gt le lessthan lt ne")

TEST_TABLE: dict[str, Any] = {
    **{name: TESTS[name] for name in _FIXED_TESTS},
    **{name: _of_number(TESTS[name]) for name in ("divisibleby", "even", "odd")},
    **{name: _comparing(TESTS[name]) for name in _COMPARISONS},
    "in": _comparing(lambda value, container: operator.contains(container, value)),
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dict": _dict,
    "namespace": _namespace,
    "raise_exception": _raise_exception,
    "range": _range,
    "strftime_now": _strftime_now,
}
