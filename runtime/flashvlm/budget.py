"""A budget of visual tokens: how many of an image's tokens a prompt keeps. Parsed, checked and refused here alone.

``64`` keeps 64 tokens and ``"all"`` keeps every one; None is no budget but the wish for a bundle's default, and stands
only where a user may leave one out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

from flashvlm.errors import SelectionError

Budget = int | Literal["all"]
ALL: Final = "all"


def parse_budget(text: str, flag: str = "--budget") -> Budget:
    """What a command line says: ``64`` or ``all``.

    Raises:
        SelectionError: it says something else.

    Example:
        >>> parse_budget("64"), parse_budget("all")
        (64, 'all')
    """
    if text == ALL:
        return ALL
    # More digits than any model has tokens are not worth a conversion; int() itself refuses 4,300 of them.
    if not (text.removeprefix("-").isdigit() and text.isascii()) or len(text) > 9:
        raise SelectionError(f"{flag} {text[:40]!r}: expected a whole number of tokens, or all")
    if int(text) < 1:
        raise SelectionError(f"{flag} {text}: expected at least 1 token, or all")
    return int(text)


def parse_budgets(text: str, flag: str = "--budget") -> tuple[Budget, ...]:
    """A list between commas, in the order written and each once.

    Raises:
        SelectionError: a part is no budget.

    Example:
        >>> parse_budgets("64, 32,all,64")
        (64, 32, 'all')
    """
    return tuple(dict.fromkeys(parse_budget(part.strip(), flag) for part in text.split(",")))


def by_size(budgets: Iterable[Budget]) -> tuple[Budget, ...]:
    """Each once, from few tokens to all.

    Example:
        >>> by_size(["all", 64, 32, 64])
        (32, 64, 'all')
    """
    return tuple(sorted(set(budgets), key=lambda budget: (budget == ALL, budget)))


def tokens_kept(budget: Budget, total: int) -> int:
    """How many of an image's ``total`` tokens a budget keeps."""
    return total if budget == ALL else min(budget, total)


def choose_budget(asked: Any, exported: Sequence[int], default: Budget, total: int) -> Budget:
    """The budget for a question: ``asked`` if the bundle has it, for None the bundle's default.

    Args:
        asked: an integer of any kind, ``"all"``, or None.
        exported, default: the budgets of the bundle, beside ``"all"``, and the one for None.
        total: tokens of an image, which says whether an export could have the budget.

    Raises:
        SelectionError: the bundle does not have it; with the line that makes one that does.

    Example:
        >>> choose_budget(None, (64, 128), 64, 576), choose_budget("all", (64, 128), 64, 576)
        (64, 'all')
    """
    if asked is None:
        return default
    if isinstance(asked, str) and asked == ALL:
        return ALL
    try:
        number = None if isinstance(asked, bool) else operator.index(asked)  # also numpy's integers
    except TypeError:
        number = None
    if number is not None and number in exported:
        return number
    possible = number is not None and 0 < number <= total
    remedy = f"export with --budget {number}" if possible else "take one of these"
    shown = repr(asked) if number is None else number
    raise SelectionError(f"budget {shown} is not in this bundle, which has {listed(exported)}; {remedy}")


def listed(exported: Iterable[int]) -> str:
    """The budgets of a bundle in words: ``32, 64, all``."""
    return ", ".join(map(str, (*exported, ALL)))
