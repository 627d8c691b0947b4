"""Answers on disk: one JSON-lines file per variant and budget, written whole, so that a cut run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import scenes
from quality.bundles import Shelf, digest
from quality.harness import Exam, Given
from quality.variants import ALL_TOKENS, DOWNSAMPLED, EVERYTHING, Variant
from scenes.exam import exam

Report = Callable[[str, int], None]  # what is being done, questions done since


@dataclass(frozen=True)
class Run:
    """One variant at one budget. ``tokens`` is what the language model got, which resolutions round."""

    variant: Variant
    budget: int
    tokens: int
    given: list[Given]


class Sitting:
    """An exam of ``count`` questions on one model, and the answers so far."""

    def __init__(self, model: str, work: Path, count: int, split: str, threads: int | None = None) -> None:
        self.shelf = Shelf(model, work)
        self.items = exam(count, split)
        self._threads = threads
        self._folder = work / "answers"
        sources = [path.read_text() for path in sorted(Path(scenes.__path__[0]).glob("*.py"))]
        self._key = digest(self.shelf.model_key, count, split, *sources)
        self._exam: Exam | None = None

    @property
    def all_tokens(self) -> int:
        return self.shelf.base.manifest.model.num_image_tokens

    @property
    def exam(self) -> Exam:
        if self._exam is None:
            self._exam = Exam(self.shelf.base, self.items, self._threads)
        return self._exam

    def file(self, variant: Variant, budget: int) -> Path:
        """Named by variant and budget for people, by a key of everything the answers depend on for us."""
        key = digest(self._key, self.shelf.selection_key(variant, budget))
        return self._folder / f"{variant.name.replace('/', '-')}-k{budget}-{key}.jsonl"

    def answers(self, variant: Variant, budget: int, report: Report = lambda *_: None) -> Run:
        """From the file, or else from the model. A budget of all tokens is ``none`` for every variant."""
        if budget >= self.all_tokens or variant.name == ALL_TOKENS:
            variant, budget = EVERYTHING, self.all_tokens
        path = self.file(variant, budget)
        tokens = variant.tokens(budget)
        if path.exists():
            report(f"{variant.name} {budget}", len(self.items))
            return Run(variant, budget, tokens, _read(path))
        given = self._sit(variant, budget, report)
        _write(given, path)
        return Run(variant, budget, tokens, given)

    def select_milliseconds(self, runs: Sequence[Run], rounds: int) -> dict[tuple[str, int], float]:
        """Median milliseconds at batch 1 by (variant, budget), of those that select."""
        selecting = [r for r in runs if r.variant.method not in (ALL_TOKENS, DOWNSAMPLED)]
        graphs = {
            (r.variant.name, r.budget): (r.variant, self.shelf.selection_graph(r.variant, r.budget)) for r in selecting
        }
        return self.exam.select_milliseconds(graphs, rounds)

    def _sit(self, variant: Variant, budget: int, report: Report) -> list[Given]:
        name = f"{variant.name} {budget}"
        report(f"{name}: export", 0)
        if variant.method == DOWNSAMPLED:
            side = round(variant.tokens(budget) ** 0.5)
            exam, graph = Exam(self.shelf.smaller(side), self.items, self._threads), None
        else:
            exam = self.exam
            graph = None if variant.method == ALL_TOKENS else self.shelf.selection_graph(variant, budget)
        report(f"{name}: vision", 0)
        exam.look()
        report(name, 0)
        return exam.sit(variant, graph, lambda done: report(name, done))


def _read(path: Path) -> list[Given]:
    return [Given(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(given: list[Given], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(json.dumps(asdict(each)) + "\n" for each in given), encoding="utf-8")
    partial.rename(path)
