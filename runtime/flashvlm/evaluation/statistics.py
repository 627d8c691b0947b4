"""What scores amount to: means and paired differences, with intervals by bootstrap over groups of items."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

RESAMPLES = 10_000
SEED = 0
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, or a difference of two, with the ends of its percentile interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


class Bootstrap:
    """Resamples of the groups of items, the same for every comparison on them.

    Items of a group are not independent, so groups are drawn, not items; a group weighs as many items as it has among
    those chosen.

    Args:
        groups: of each item, [Q].
        chosen: bool [Q], which items count, such as those of a kind; None for all.

    Example:
        >>> sample = Bootstrap(["left.jpg", "left.jpg", "right.jpg"])
        >>> sample.mean([1, 1, 1]), sample.difference([1, 1, 0], [1, 1, 0]).is_clear
        (Interval(value=1.0, low=1.0, high=1.0), False)
    """

    def __init__(
        self, groups: Sequence[Hashable], chosen: Sequence[bool] | np.ndarray | None = None, resamples: int = RESAMPLES
    ) -> None:
        number = {group: n for n, group in enumerate(dict.fromkeys(groups))}
        self.indices = np.arange(len(groups)) if chosen is None else np.flatnonzero(chosen)
        self._group = np.array([number[group] for group in groups])[self.indices]
        self._drawn = _drawn(len(number), resamples)  # [R,G]
        self._sizes = self._drawn @ self._per_group(np.ones(len(self.indices)))  # [R] items in each resample

    def mean(self, scores: Sequence[float]) -> Interval:
        """Of the chosen ones among scores [Q]."""
        return self._interval(np.asarray(scores, dtype=np.float64)[self.indices])

    def difference(self, scores: Sequence[float], reference: Sequence[float]) -> Interval:
        """Mean of ``scores`` less that of ``reference``, [Q] on the same items."""
        change = np.asarray(scores, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
        return self._interval(change[self.indices])

    def _interval(self, values: np.ndarray) -> Interval:
        sums = self._drawn @ self._per_group(values)  # [R]
        drawn = self._sizes > 0  # a kind of few items may be missing from a resample
        if not drawn.any():
            return Interval(float("nan"), float("nan"), float("nan"))
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(sums[drawn] / self._sizes[drawn], [tail, 1 - tail])
        return Interval(float(values.mean()), float(low), float(high))

    def _per_group(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._group, weights=values, minlength=self._drawn.shape[1]).astype(np.float32)


@cache
def _drawn(groups: int, resamples: int) -> np.ndarray:
    """How often each group is in each resample, [R,G]; float32, in which such counts and their sums are exact."""
    rng = np.random.default_rng(SEED)
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(np.float32)
