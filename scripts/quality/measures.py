"""What the answers amount to: accuracy by kind, share of kept patches, paired intervals by bootstrap over scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import numpy as np

from quality.harness import Given
from quality.results import Run
from scenes.exam import Item

RESAMPLES = 10_000
SEED = 0
CONFIDENCE = 0.95
ALL, SEEN, HELD_OUT = "all", "seen", "held out"


@dataclass(frozen=True)
class Difference:
    """Accuracy of one run less that of another on the same questions, with a 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Measure:
    """One run on the questions of one kind. ``kept`` is None where no question is about a thing."""

    questions: int
    accuracy: float
    kept: float | None


class Subset:
    """Questions of a kind, with one set of resampled scenes for every comparison on them.

    Questions of a scene are not independent, so scenes are drawn, not questions; a scene weighs as many questions of
    the kind as it has.
    """

    def __init__(self, items: Sequence[Item], chosen: Sequence[bool], resamples: int = RESAMPLES) -> None:
        self.indices = np.flatnonzero(chosen)
        number = [n for n, (_, group) in enumerate(groupby(items, key=lambda item: item.scene)) for _ in group]
        self._scene = np.array(number)[self.indices]  # [Q]
        self._scenes = max(number) + 1
        self._drawn = _drawn(self._scenes, resamples)  # [R, scenes]
        self._sizes = self._drawn @ self._per_scene(np.ones(len(self.indices)))  # [R] questions a resample

    def measure(self, given: Sequence[Given]) -> Measure:
        chosen = [given[i] for i in self.indices]
        kept = [each.kept for each in chosen if each.kept is not None]
        accuracy = float(np.mean([each.right for each in chosen])) if chosen else float("nan")
        return Measure(len(chosen), accuracy, float(np.mean(kept)) if kept else None)

    def difference(self, given: Sequence[Given], reference: Sequence[Given]) -> Difference:
        """Paired percentile bootstrap of the difference in accuracy."""
        change = np.array([float(given[i].right) - float(reference[i].right) for i in self.indices])
        sums = self._drawn @ self._per_scene(change)  # [R]
        drawn = self._sizes > 0  # a kind of few questions may be missing from a resample
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(sums[drawn] / self._sizes[drawn], [tail, 1 - tail])
        return Difference(float(change.mean()), float(low), float(high))

    def _per_scene(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._scene, weights=values, minlength=self._scenes).astype(np.float32)


@cache
def _drawn(scenes: int, resamples: int) -> np.ndarray:
    """How often each scene is in each resample, [R, scenes]; float32, in which such counts and their sums are exact."""
    rng = np.random.default_rng(SEED)
    return rng.multinomial(scenes, np.full(scenes, 1 / scenes), size=resamples).astype(np.float32)


def subsets(items: Sequence[Item]) -> dict[str, Subset]:
    """All questions, those of each kind, and those about combinations seen and not seen in training."""
    kinds = dict.fromkeys(item.question.kind for item in items)
    chosen = {ALL: [True] * len(items)} | {k: [item.question.kind == k for item in items] for k in kinds}
    about = [bool(item.question.about) for item in items]
    chosen[SEEN] = [a and not item.held_out for a, item in zip(about, items, strict=True)]
    chosen[HELD_OUT] = [item.held_out for item in items]
    return {name: Subset(items, mask) for name, mask in chosen.items() if any(mask)}


@dataclass(frozen=True)
class Scored:
    """A run measured on every subset, against the references at the same budget.

    by          subset -> measure
    relative    subset -> accuracy over that of all tokens; None where that is 0
    against     reference variant -> subset -> difference
    select_ms   milliseconds of the selection graph at batch 1; None without one, or where not measured
    """

    run: Run
    by: dict[str, Measure]
    relative: dict[str, float | None]
    against: dict[str, dict[str, Difference]]
    select_ms: float | None


def score(
    runs: Sequence[Run],
    items: Sequence[Item],
    everything: Run,
    references: Sequence[Run],
    milliseconds: dict[tuple[str, int], float],
) -> list[Scored]:
    """Every run against all tokens, and against each reference at its budget."""
    groups = subsets(items)
    whole = {name: group.measure(everything.given).accuracy for name, group in groups.items()}
    found = []
    for run in runs:
        by = {name: group.measure(run.given) for name, group in groups.items()}
        against = {
            reference.variant.name: {
                name: group.difference(run.given, reference.given) for name, group in groups.items()
            }
            for reference in references
            if reference.budget == run.budget and reference.variant.name != run.variant.name
        }
        relative = {name: m.accuracy / whole[name] if whole[name] else None for name, m in by.items()}
        time = milliseconds.get((run.variant.name, run.budget))
        found.append(Scored(run, by, relative, against, time))
    return found
