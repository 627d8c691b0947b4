"""What scores amount to, against plain loops and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flashvlm.errors import FlashVLMError
from flashvlm.evaluation import Bootstrap, Interval, Item, Task, exact_match
from flashvlm.evaluation.statistics import SEED

GROUPS = [f"image {n // 3}" for n in range(24)]  # 8 groups of 3


def scores(seed: int, share: float = 0.5) -> np.ndarray:
    return (np.random.default_rng(seed).random(len(GROUPS)) < share).astype(float)


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    chosen = np.random.default_rng(0).random(len(GROUPS)) < 0.4
    chosen[:3] = False  # a group that has none of them
    a, b = scores(1), scores(2)
    sample = Bootstrap(GROUPS, chosen, resamples=500)

    names = list(dict.fromkeys(GROUPS))
    drawn = np.random.default_rng(SEED).multinomial(len(names), [1 / len(names)] * len(names), size=500)
    for found, values in ((sample.mean(a), a), (sample.difference(a, b), a - b)):
        of_group = {
            g: [v for v, other, c in zip(values, GROUPS, chosen, strict=True) if c and other == g] for g in names
        }
        means = []
        for counts in drawn:
            resample = [value for g, count in zip(names, counts, strict=True) for value in of_group[g] * count]
            means.append(np.mean(resample))
        assert found.value == pytest.approx(values[chosen].mean())
        assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]))
        assert found.low < found.value < found.high


def test_items_of_a_group_count_as_one_draw() -> None:
    """Groups that are right or wrong as a whole give the interval of 40 draws, not of 280."""
    groups = [n // 7 for n in range(280)]
    right = [float(group % 2) for group in groups]
    found = Bootstrap(groups).difference(right, [0.0] * 280)
    half = 1.96 * math.sqrt(0.25 / 40)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.03)
    alone = Bootstrap(range(280)).mean(right)
    half = 1.96 * math.sqrt(0.25 / 280)
    assert (alone.low, alone.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.01)


def test_by_hand() -> None:
    # One group: every resample is the sample.
    assert Bootstrap(["a"] * 4).mean([1, 1, 1, 0]) == Interval(0.75, 0.75, 0.75)
    # Two: a quarter of the resamples has one alone, a quarter the other.
    assert Bootstrap(["a", "b"]).mean([1, 0]) == Interval(0.5, 0.0, 1.0)
    # The one item that counts is in a resample or not; those without say nothing.
    assert Bootstrap(["a", "b"], [True, False]).difference([1, 0], [0, 1]) == Interval(1.0, 1.0, 1.0)
    assert not Interval(0.5, 0.0, 1.0).is_clear
    assert Interval(0.5, 0.1, 1.0).is_clear
    assert Interval(-0.5, -1.0, -0.1).is_clear
    assert math.isnan(Bootstrap(["a"], [False]).mean([1]).value)


def test_equal_scores_do_not_differ() -> None:
    assert Bootstrap(GROUPS).difference(scores(1), scores(1)) == Interval(0.0, 0.0, 0.0)


def test_items_by_kind_and_group() -> None:
    items = (
        Item("1", (), "How many?", ("two",), kind="count", group="x"),
        Item("2", (), "What?", ("a cat",), kind="what", group="x"),
        Item("3", (), "Why?", ("so",)),
    )
    task = Task("t", items)
    assert {kind: chosen.tolist() for kind, chosen in task.kinds.items()} == {
        "all": [True, True, True],
        "count": [True, False, False],
        "what": [False, True, False],
    }
    assert task.groups == ["x", "x", "3"]
    assert exact_match("two", ("2", "two")) == 1.0
    assert exact_match("two ", ("2", "two")) == 0.0
    with pytest.raises(FlashVLMError, match=r"^task t: expected questions, found none$"):
        Task("t", ())
    with pytest.raises(FlashVLMError, match=r"^task t: expected an id for each item, found '1' twice$"):
        Task("t", (*items, items[0]))
