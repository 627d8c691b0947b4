"""Variants answer the exam: each through a pipeline of its own, over images that all of them see once."""

from __future__ import annotations

import contextlib
import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from flashvlm import Pipeline
from flashvlm.budget import ALL, Budget
from flashvlm.bundle import Bundle
from flashvlm.encoder import question, request
from flashvlm.evaluation import EvalRun, Prediction
from flashvlm.generation import Timings
from flashvlm.sessions import ImageFeatures
from flashvlm.sessions.onnxruntime import OnnxRuntimeSession
from quality.bundles import Shelf
from quality.task import Asked, exam_task
from quality.variants import ALL_TOKENS, DOWNSAMPLED, EVERYTHING, POOLED, Variant
from scenes.draw import draw
from scenes.exam import exam

Step = Callable[[str, int], None]  # what is being done, questions done since


@dataclass(frozen=True)
class Run:
    """One variant at one budget.

    tokens  what the language model got, which resolutions round
    kept    of each prediction, the share of asked-for patches that were kept; None where it has no meaning
    """

    variant: Variant
    budget: int
    tokens: int
    predictions: list[Prediction]
    kept: Sequence[float | None]


class Sitting:
    """An exam of ``count`` questions on one model."""

    def __init__(self, model: str, work: Path, count: int, split: str, threads: int | None = None) -> None:
        self.shelf = Shelf(model, work)
        self.items = exam(count, split)
        self.task = exam_task(self.items, split)
        self._folder, self._threads = work / "predictions", threads
        self._seen: dict[bytes, ImageFeatures] = {}
        side, columns = self.shelf.base.manifest.visual[0].grid
        assert side == columns
        self.all_tokens = side * columns
        self._asked = Asked(self.items, side)

    def everything(self, step: Step = lambda *_: None) -> Run:
        """All tokens."""
        return self.runs(EVERYTHING, [self.all_tokens], step)[0]

    def runs(self, variant: Variant, budgets: Sequence[int], step: Step = lambda *_: None) -> list[Run]:
        """A variant at its budgets, from the predictions on disk or else from the model."""
        step(f"{variant.name}: export", 0)
        runs = []
        for some in [[budget] for budget in budgets] if variant.method == DOWNSAMPLED else [budgets]:
            found = self._answers(variant, some, step)
            runs += [self._run(variant, budget, found[_asked(variant, budget)]) for budget in some]
        return runs

    def select_milliseconds(self, runs: Sequence[Run], rounds: int) -> dict[tuple[str, int], float]:
        """Median wall milliseconds of selection at batch 1, on the exam's own questions, by (variant, budget).

        Every round runs each once, so that other load on the machine falls on all of them alike.
        """
        budgets: dict[str, tuple[Variant, list[int]]] = {}
        for run in runs:
            if _asked(run.variant, run.budget) != ALL:
                budgets.setdefault(run.variant.name, (run.variant, []))[1].append(run.budget)
        measured: dict[tuple[str, int], list[float]] = {}
        with contextlib.ExitStack() as stack:
            pipelines = {
                name: stack.enter_context(self._open(self._bundle(variant, sizes)))
                for name, (variant, sizes) in budgets.items()
            }
            turns = range(rounds + 2)  # two to warm up
            items = [self.items[turn * len(self.items) // len(turns)] for turn in turns]
            asked = [request([question(item.question.text, [Image.fromarray(draw(item.scene))])]) for item in items]
            prompts = {name: pipeline.encoder.read(asked, Timings()) for name, pipeline in pipelines.items()}
            features = {name: pipelines[name].encoder.see(prompts[name], Timings()) for name in pipelines}
            for turn in turns:
                for name, (variant, sizes) in budgets.items():
                    for budget in sizes:
                        started = time.perf_counter()
                        pipelines[name].encoder.select([prompts[name][turn]], features[name], variant.tokens(budget))
                        measured.setdefault((name, budget), []).append((time.perf_counter() - started) * 1e3)
        return {run: statistics.median(taken[2:]) for run, taken in measured.items()}

    def _answers(self, variant: Variant, budgets: Sequence[int], step: Step) -> dict[Budget, list[Prediction]]:
        """By budget as the variant's bundle has it."""
        bundle = self._bundle(variant, budgets)
        folder = self._folder / variant.name.replace("/", "-")
        with self._open(bundle) as pipeline:
            run = EvalRun(pipeline, self.task, folder, keep_indices=True)
            asked = [_asked(variant, budget) for budget in budgets]
            return run.predict(asked, lambda budget, done: step(f"{variant.name} {budget}", done))

    def _run(self, variant: Variant, budget: int, predictions: list[Prediction]) -> Run:
        # Neither averaged tokens nor those of smaller images are patches that were kept.
        has_patches = variant.method not in (DOWNSAMPLED, POOLED)
        kept = self._asked.kept_shares(predictions) if has_patches else [None] * len(predictions)
        return Run(variant, budget, variant.tokens(budget), predictions, kept)

    def _bundle(self, variant: Variant, budgets: Sequence[int]) -> Bundle:
        if variant.method == ALL_TOKENS:
            return self.shelf.base
        return self.shelf.bundle(variant, [*dict.fromkeys(map(variant.tokens, budgets))])

    def _open(self, bundle: Bundle) -> Pipeline:
        return Pipeline(bundle, _Session(bundle, self._threads, self._seen))


def _asked(variant: Variant, budget: int) -> Budget:
    """What the variant's bundle is asked for: a smaller image keeps all its tokens, and is a model of its own."""
    return ALL if variant.method in (ALL_TOKENS, DOWNSAMPLED) else variant.tokens(budget)


class _Session(OnnxRuntimeSession):
    """Features of an image are those another variant saw: all have one vision graph for pixels of one size."""

    def __init__(self, bundle: Bundle, threads: int | None, seen: dict[bytes, ImageFeatures]) -> None:
        super().__init__(bundle, "cpu", threads)
        self._seen = seen

    def vision(self, graph: str, pixel_values: np.ndarray, order: np.ndarray | None = None) -> list[ImageFeatures]:
        assert order is None
        keys = [hashlib.sha256(image.tobytes()).digest() for image in pixel_values]
        for key, image in zip(keys, pixel_values, strict=True):
            if key not in self._seen:
                (self._seen[key],) = super().vision(graph, image[None])
        return [self._seen[key] for key in keys]
