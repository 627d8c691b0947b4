"""What the predictions amount to: accuracy by kind, share of kept patches, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashvlm.evaluation import Bootstrap, Interval, Task, scores
from flashvlm.evaluation.tasks import ALL_KINDS
from quality.runs import Run
from scenes.exam import Item

ALL, SEEN, HELD_OUT = ALL_KINDS, "seen", "held out"


@dataclass(frozen=True)
class Measure:
    """One run on the questions of one kind. ``kept`` is None where no question is about a thing."""

    questions: int
    accuracy: float
    kept: float | None


@dataclass(frozen=True)
class Scored:
    """A run measured on every subset, and against the reference at the same budget.

    by          subset -> measure
    relative    subset -> accuracy over that of all tokens; None where that is 0
    against     subset -> difference from the reference; empty for the reference itself, and where it was not run
    select_ms   milliseconds of selection at batch 1; None without one, or where not measured
    """

    run: Run
    by: dict[str, Measure]
    relative: dict[str, float | None]
    against: dict[str, Interval]
    select_ms: float | None


def subsets(task: Task, items: Sequence[Item]) -> dict[str, np.ndarray]:
    """bool [items]: all questions, those of each kind, and those about combinations seen and not seen in training."""
    held_out = np.array([item.held_out for item in items])
    about = np.array([bool(item.question.about) for item in items])
    chosen = {**task.kinds, SEEN: about & ~held_out, HELD_OUT: held_out}
    return {name: mask for name, mask in chosen.items() if mask.any()}


def measure(run: Run, chosen: np.ndarray) -> Measure:
    right = np.array(scores(run.predictions))[chosen]
    kept = [share for share, wanted in zip(run.kept, chosen, strict=True) if wanted and share is not None]
    return Measure(len(right), float(right.mean()), float(np.mean(kept)) if kept else None)


def score(
    runs: Sequence[Run],
    task: Task,
    items: Sequence[Item],
    everything: Run,
    reference: str,
    milliseconds: dict[tuple[str, int], float],
) -> list[Scored]:
    """Every run against all tokens, and against the variant ``reference`` at its budget."""
    chosen = subsets(task, items)
    samples = {name: Bootstrap(task.groups, mask) for name, mask in chosen.items()}
    whole = {name: measure(everything, mask).accuracy for name, mask in chosen.items()}
    at = {run.budget: scores(run.predictions) for run in runs if run.variant.name == reference}
    found = []
    for run in runs:
        by = {name: measure(run, mask) for name, mask in chosen.items()}
        relative = {name: m.accuracy / whole[name] if whole[name] else None for name, m in by.items()}
        against = {}
        if run.variant.name != reference and run.budget in at:
            own = scores(run.predictions)
            against = {name: sample.difference(own, at[run.budget]) for name, sample in samples.items()}
        time = milliseconds.get((run.variant.name, run.budget))
        found.append(Scored(run, by, relative, against, time))
    return found
