"""Results as JSON and as docs/quality-tables.md, whose blocks stand between markers that name them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashvlm.evaluation import Interval
from flashvlm.evaluation.statistics import CONFIDENCE, RESAMPLES
from quality.measures import ALL, HELD_OUT, SEEN, Scored
from quality.variants import GRIDS, METHODS, REFERENCE, ablation, defaults

SCHEMA_VERSION = 1
DOCUMENT, PICTURE = "quality-tables.md", "quality.png"
TITLES = {"methods": "Methods", "ablations": "What decides the defaults"}
BY_KIND = (64, 16)  # budgets at which kinds are told apart


@dataclass(frozen=True)
class Conditions:
    """Of a whole report: the command that gives it, and what it ran on."""

    command: str
    model: str
    questions: int
    scenes: int
    split: str
    backend: str

    def __str__(self) -> str:
        return (
            f"{self.questions:,} questions about {self.scenes} held-out scenes (split `{self.split}`), greedy answers, "
            f"right only if equal to the expected text; {CONFIDENCE:.0%} paired bootstrap intervals, {RESAMPLES:,} "
            f"resamples of scenes; {self.backend}"
        )


def to_json(conditions: Conditions, everything: Scored, scored: Sequence[Scored]) -> dict[str, Any]:
    """Plain values; shares and differences of 1, milliseconds."""
    return {
        "schema_version": SCHEMA_VERSION,
        **asdict(conditions),
        "runs": [
            {
                **asdict(each.run.variant),
                "variant": each.run.variant.name,
                "budget": each.run.budget,
                "tokens": each.run.tokens,
                "select_ms": each.select_ms,
                "by": {name: {**asdict(measure), "relative": each.relative[name]} for name, measure in each.by.items()},
                "against": {REFERENCE: {subset: asdict(difference) for subset, difference in each.against.items()}},
            }
            for each in (everything, *scored)
        ],
    }


# --- tables --------------------------------------------------------------------------------------------------------

Cell = Callable[[Scored], str]


class Scores:
    """Lookup of runs by variant and budget."""

    def __init__(self, everything: Scored, scored: Iterable[Scored]) -> None:
        self.everything = everything
        self._found = {(each.run.variant.name, each.run.budget): each for each in scored}

    def get(self, variant: str, budget: int) -> Scored | None:
        whole = self.everything.run.budget
        return self.everything if budget >= whole else self._found.get((variant, budget))

    def budgets(self, variants: Iterable[str]) -> list[int]:
        """Descending, those that any of the variants ran at."""
        names = set(variants)
        return sorted({budget for name, budget in self._found if name in names}, reverse=True)

    def has(self, variants: Iterable[str]) -> bool:
        return {name for name, _ in self._found} >= set(variants)


def methods_block(scores: Scores, conditions: Conditions) -> str:
    names = [variant.name for variant in METHODS if scores.has([variant.name])]
    budgets = scores.budgets(names)
    whole = scores.everything.by[ALL]
    parts = [
        _intro(conditions),
        f"**Accuracy, %**, and as a share of what all {scores.everything.run.tokens} tokens reach, "
        f"{_percent(whole.accuracy)} %.",
        _table("method", names, budgets, scores, _accuracy),
        f"**Difference in accuracy from `{REFERENCE}`**, points, with its interval; bold where it leaves zero out.",
        _table("method", names[1:], budgets, scores, _versus),
        "**Patches of the asked-for things that were kept, %**, over questions about things. Few tokens cannot hold "
        "all patches of a large thing; merged and pooled tokens count by the index they carry or not at all.",
        _table("method", names, budgets, scores, lambda s: _percent(s.by[ALL].kept)),
        "**Selection alone, milliseconds** at batch 1, its inputs gathered: median over questions, variants in turn.",
        _table("method", names, budgets, scores, lambda s: "" if s.select_ms is None else f"{s.select_ms:.2f}"),
    ]
    for budget in (b for b in BY_KIND if b in budgets):
        parts += [f"**Accuracy by kind at {budget} tokens, %.** Held out: about a combination of colour and shape "
                  "that training never showed.", _by_kind(names, budget, scores)]  # fmt: skip
    return "\n\n".join(parts)


def ablations_block(scores: Scores, conditions: Conditions) -> str:
    budgets = scores.budgets([variant.name for grid in _grids().values() for _, variant in grid])
    budgets = [b for b in budgets if all(scores.get(v.name, b) for grid in _grids().values() for _, v in grid)]
    parts = [
        _intro(conditions),
        f"Accuracy in %, and the difference from `{REFERENCE}` in points; bold where its interval leaves zero out.",
    ]
    rows = []
    for parameter, grid in _grids().items():
        for value, variant in grid:
            label = f"{parameter} {value:g}" if isinstance(value, float) else f"{parameter} {value}"
            if variant.name == REFERENCE:
                label += " (default)"
            rows.append((label, variant.name))
    parts.append(_table("", rows, budgets, scores, _with_difference))
    return "\n\n".join(parts)


def _grids() -> dict[str, list[tuple[Any, Any]]]:
    """Parameter -> (value, variant), with the default among them wherever it is."""
    found = {}
    for parameter, values in GRIDS.items():
        default = defaults()[parameter]
        every = values if default in values else (*values, default)
        found[parameter] = [(value, ablation(parameter, value)) for value in every]
    return found


def _intro(conditions: Conditions) -> str:
    return f"`{conditions.command}`\n\n{conditions}."


def _table(
    corner: str, names: Sequence[str | tuple[str, str]], budgets: Sequence[int], scores: Scores, cell: Cell
) -> str:
    rows = []
    for entry in names:
        label, name = entry if isinstance(entry, tuple) else (f"`{entry}`", entry)
        found = [scores.get(name, budget) for budget in budgets]
        rounded = [s and (s.run.tokens != s.run.budget) for s in found]
        cells = ["" if s is None else cell(s) for s in found]
        rows.append([label, *(f"{c} ({s.run.tokens} tokens)" if r and c and s else c
                              for c, r, s in zip(cells, rounded, found, strict=True))])  # fmt: skip
    return _markdown([corner, *map(str, budgets)], rows)


def _by_kind(names: Sequence[str], budget: int, scores: Scores) -> str:
    kinds = [name for name in scores.everything.by if name not in (ALL, SEEN, HELD_OUT)]
    kinds += [name for name in (SEEN, HELD_OUT) if name in scores.everything.by]
    rows = [["all tokens", *(_percent(scores.everything.by[kind].accuracy) for kind in kinds)]]
    for name in names:
        found = scores.get(name, budget)
        if found:
            rows.append([f"`{name}`", *(_percent(found.by[kind].accuracy) for kind in kinds)])
    return _markdown([f"at {budget}", *kinds], rows)


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _accuracy(scored: Scored) -> str:
    relative = scored.relative[ALL]
    share = "" if relative is None else f" ({relative:.2f})"
    return _percent(scored.by[ALL].accuracy) + share


def _versus(scored: Scored) -> str:
    return interval(scored.against[ALL]) if scored.against else ""


def _with_difference(scored: Scored) -> str:
    accuracy, difference = _percent(scored.by[ALL].accuracy), _versus(scored)
    return f"{accuracy}; {difference}" if difference else accuracy


def interval(difference: Interval) -> str:
    """``-1.2 [-2.0, -0.4]`` in points; bold where zero is outside."""
    value, low, high = (100 * v for v in (difference.value, difference.low, difference.high))
    text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if difference.is_clear else text


# --- document ------------------------------------------------------------------------------------------------------


def empty() -> str:
    """The document before any run."""
    parts = [
        "# Selection quality: tables",
        "Written by `scripts/benchmark quality --write docs`, not by hand. Conclusions: [quality.md](quality.md).",
    ]
    for name, title in TITLES.items():
        parts += [f"## {title}", f"<!-- {name} -->\n<!-- /{name} -->"]
    return "\n\n".join(parts) + "\n"


def write_blocks(document: Path, blocks: dict[str, str]) -> None:
    """Puts each block between ``<!-- name -->`` and ``<!-- /name -->``; what a run did not cover stays.

    Raises:
        ValueError: the document lacks a pair of markers.
    """
    text = document.read_text(encoding="utf-8") if document.exists() else empty()
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, found, rest = text.partition(start)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{document}: expected the markers {start} and {end}; remove it, and it is written anew")
        text = f"{head}{start}\n\n{block}\n\n{end}{tail}"
    replace(document, text.encode())


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, (json.dumps(values, indent=1) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """A file that is the old one or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.rename(path)
