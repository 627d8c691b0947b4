"""The picture of docs/quality.md: accuracy against budget, one line a method, each labelled where it ends."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image

from flashvlm import charts
from quality.measures import ALL
from quality.report import Scores
from quality.variants import REFERENCE

Rgb = tuple[int, int, int]

WIDTH, HEIGHT, LABELS, AXIS = 760, 520, 210, 64  # pixels: plot, room for labels on its right, for numbers on its left
MARGIN, TOP, BOTTOM = 40, 126, 100
LINE_HEIGHT = 23
# Okabe and Ito's palette for methods that read the question or compete with ours; grays for the plain ones.
COLOURS: dict[str, Rgb] = {
    "flashvlm": (0, 114, 178),
    "flashvlm-contrast": (0, 60, 110),
    "flashvlm-published": (230, 130, 0),
    "vispruner": (0, 148, 110),
    "cdpruner": (204, 90, 150),
    "trim": (196, 66, 0),
    "divprune": (70, 160, 220),
    "visionzip": (150, 130, 0),
}
PLAIN: tuple[Rgb, ...] = ((84, 90, 100), (112, 118, 128), (138, 144, 153), (160, 166, 175))


def draw(scores: Scores, names: Sequence[str]) -> Image.Image:
    """Lines from all tokens on the left to the smallest budget on the right, on a logarithmic axis."""
    budgets = scores.budgets(names)
    whole = scores.everything
    plain = iter(PLAIN * len(names))
    colours = {name: _share(COLOURS.get(name) or next(plain)) for name in names}
    lines: dict[str, list[tuple[int, float]]] = {}
    for name in names:
        found = [scores.get(name, budget) for budget in budgets]
        lines[name] = [(whole.run.tokens, whole.by[ALL].accuracy)]
        lines[name] += [(s.run.tokens, s.by[ALL].accuracy) for s in found if s is not None]
    values = [value for line in lines.values() for _, value in line]
    low, high = _limits(min(values), max(values))
    width, height = MARGIN + AXIS + WIDTH + LABELS + MARGIN, TOP + HEIGHT + BOTTOM
    figure = charts.new_figure(width / 100, height / 100)
    details = f"%, by visual tokens kept of {whole.run.tokens}"
    charts.add_heading(figure, "Accuracy on held-out questions", details)
    axes = charts.add_axes(figure, (MARGIN + AXIS) / 100, BOTTOM / 100, WIDTH / 100, HEIGHT / 100, "")
    axes.set_xscale("log")
    least = min(n for line in lines.values() for n, _ in line)
    axes.set_xlim(whole.run.tokens, least if least < whole.run.tokens else whole.run.tokens / 2)
    axes.set_ylim(100 * low, 100 * high)
    axes.minorticks_off()
    places = (whole.run.tokens, *budgets)
    axes.set_xticks(places, ["all", *map(str, budgets)])
    axes.set_yticks([100 * (low + n * _step(high - low)) for n in range(round((high - low) / _step(high - low)) + 1)])
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.tick_params(axis="y", labelcolor=charts.MUTED)
    axes.tick_params(axis="x", pad=10)
    axes.grid(axis="y", color=charts.RULE, linewidth=1)
    axes.set_xlabel("visual tokens kept", fontsize=11, color=charts.MUTED, labelpad=10)

    for name, line in lines.items():
        ours = name == REFERENCE  # on top
        tokens, accuracies = zip(*((n, 100 * accuracy) for n, accuracy in line), strict=True)
        style = {"linewidth": 2.9, "markersize": 8.5, "zorder": 4} if ours else {"linewidth": 1.5, "markersize": 5.5}
        marks = {"marker": "o", "markevery": slice(1, None), "clip_on": False}
        axes.plot(tokens, accuracies, color=colours[name], **(marks | style))  # type: ignore[arg-type]
    ends = {name: HEIGHT * (high - line[-1][1]) / (high - low) for name, line in lines.items()}
    for name, y in _apart(ends).items():
        where = (1 + 26 / WIDTH, 1 - y / HEIGHT)
        pointer = {"arrowstyle": "-", "color": charts.RULE, "shrinkA": 2, "shrinkB": 6}
        size, colour = 11.5 if name == REFERENCE else 10.5, colours[name]
        axes.annotate(
            f"{100 * lines[name][-1][1]:.1f}", (lines[name][-1][0], 100 * lines[name][-1][1]), where,
            textcoords="axes fraction", va="center", fontsize=size, color=colour, arrowprops=pointer,
        )  # fmt: skip
        weight = "bold" if name == REFERENCE else "normal"
        at = (where[0] + 46 / WIDTH, where[1])
        axes.text(*at, name, va="center", fontsize=size, color=colour, weight=weight, transform=axes.transAxes)
    content = io.BytesIO()
    charts.save(figure, content)
    return Image.open(content).convert("RGB")


def _share(colour: Rgb) -> tuple[float, ...]:
    return tuple(channel / 255 for channel in colour)


def _limits(lowest: float, highest: float) -> tuple[float, float]:
    """Whole steps around the values."""
    step = _step(max(highest - lowest, 0.02))
    low, high = math.floor(lowest / step) * step, math.ceil(highest / step) * step
    return low, high if high > low else low + step


def _step(span: float) -> float:
    return next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if span / step <= 10 or step == 0.2)


def _apart(wanted: dict[str, float]) -> dict[str, float]:
    """Heights as near to the wanted ones as labels of LINE_HEIGHT allow: neighbours that touch share their mean."""
    order = sorted(wanted, key=wanted.__getitem__)
    groups = [([name], wanted[name]) for name in order]  # names of a run of labels, and its centre
    merged = True
    while merged:
        merged = False
        for i, (upper, lower) in enumerate(pairwise(groups)):
            if lower[1] - upper[1] < LINE_HEIGHT * (len(upper[0]) + len(lower[0])) / 2:
                names = upper[0] + lower[0]
                groups[i : i + 2] = [(names, sum(wanted[name] for name in names) / len(names))]
                merged = True
                break
    return {
        name: centre + LINE_HEIGHT * (row - (len(names) - 1) / 2)
        for names, centre in groups
        for row, name in enumerate(names)
    }
