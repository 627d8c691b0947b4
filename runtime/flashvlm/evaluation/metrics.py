"""How an answer is judged: text and right answers in, a score of 0 to 1 out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if the text is one of the answers, to the letter.

    Example:
        >>> exact_match("a cat", ["cat", "a cat"]), exact_match("A cat.", ["a cat"])
        (1.0, 0.0)
    """
    return float(text in answers)
