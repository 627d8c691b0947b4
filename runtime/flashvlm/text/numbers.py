"""Numbers as English words."""

from __future__ import annotations

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """0 to 9999, as the package num2words writes them.

    Example:
        >>> in_words(64), in_words(1024)
        ('sixty-four', 'one thousand and twenty-four')
    """
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = number % size
            joint = "" if not rest else ", " if rest >= 100 else " and "
            return f"{in_words(number // size)} {name}{joint}{in_words(rest) if rest else ''}"
    if number < len(_ONES):
        return _ONES[number]
    return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")
