"""The picture of docs/quality.md: accuracy against budget, one line a method, each labelled where it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image

from flashvlm.kept_picture import INK, MARGIN, MUTED, RULE, Rgb
from flashvlm.profiling.report import Pen
from quality.measures import ALL
from quality.report import Scores
from quality.variants import REFERENCE

WIDTH, HEIGHT, LABELS, AXIS = 760, 520, 210, 64  # plot, room for labels on its right, for numbers on its left
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
    colours = {name: COLOURS.get(name) or next(plain) for name in names}
    lines: dict[str, list[tuple[int, float]]] = {}
    for name in names:
        found = [scores.get(name, budget) for budget in budgets]
        lines[name] = [(whole.run.tokens, whole.by[ALL].accuracy)]
        lines[name] += [(s.run.tokens, s.by[ALL].accuracy) for s in found if s is not None]
    values = [value for line in lines.values() for _, value in line]
    low, high = _limits(min(values), max(values))
    top, left = MARGIN + 70, MARGIN + AXIS
    pen = Pen(left + WIDTH + LABELS + MARGIN, top + HEIGHT + 76 + MARGIN)
    pen.text(MARGIN, MARGIN + 24, "Accuracy on held-out questions", INK, 26, "ls")
    pen.text(MARGIN, MARGIN + 50, f"%, by visual tokens kept of {whole.run.tokens}", MUTED, 18, "ls")

    most, least = math.log(whole.run.tokens), math.log(min(n for line in lines.values() for n, _ in line))

    def place(tokens: int, accuracy: float) -> tuple[float, float]:
        share = (most - math.log(tokens)) / max(most - least, 1e-9)
        return left + WIDTH * share, top + HEIGHT * (high - accuracy) / (high - low)

    step = _step(high - low)
    tick = low
    while tick <= high + 1e-9:
        y = place(whole.run.tokens, tick)[1]
        pen.line([(left, y), (left + WIDTH, y)], RULE, 1)
        pen.text(left - 14, y, f"{100 * tick:.0f}", MUTED, 18, "rm")
        tick += step
    for tokens in (whole.run.tokens, *budgets):
        x = place(tokens, low)[0]
        pen.text(x, top + HEIGHT + 16, "all" if tokens == whole.run.tokens else str(tokens), INK, 18, "mt")
    pen.text(left + WIDTH / 2, top + HEIGHT + 48, "visual tokens kept", MUTED, 18, "mt")

    order = sorted(names, key=lambda name: name == REFERENCE)  # ours last, on top
    for name in order:
        points = [place(*point) for point in lines[name]]
        ours = name == REFERENCE
        pen.line(points, colours[name], 4 if ours else 2)
        for x, y in points[1:]:
            pen.dot(x, y, 6 if ours else 4, colours[name], colours[name])
    ends = {name: place(*line[-1])[1] for name, line in lines.items()}
    for name, y in _apart(ends).items():
        x = place(*lines[name][-1])[0]
        pen.line([(x + 8, ends[name]), (left + WIDTH + 26, y)], RULE, 1)
        value = f"{100 * lines[name][-1][1]:.1f}"
        pen.text(left + WIDTH + 32, y, value, colours[name], 18, "lm")
        pen.text(left + WIDTH + 78, y, name, colours[name], 20 if name == REFERENCE else 18, "lm")
    return pen.finished()


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
