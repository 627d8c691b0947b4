"""A profile as a picture: the time to first token against the budget, and what it is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from flashvlm import charts
from flashvlm.budget import ALL
from flashvlm.profiling.measure import BudgetProfile, Profile, Recommendation
from flashvlm.profiling.table import digits_of, memory, statistics
from flashvlm.sizes import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "preprocess": charts.GRAY,
    "vision": charts.SKY,
    "select": charts.ORANGE,
    "prefill": charts.GREEN,
}
WIDTH, HEIGHT = 14.0, 6.9  # inches
CLOSE = 0.08  # budgets nearer than this share of the axis would have labels that touch


def draw(profile: Profile, recommendation: Recommendation | None, path: Path) -> None:
    """Writes a PNG.

    Raises:
        MissingMatplotlibError: there is no matplotlib.
    """
    figure = charts.new_figure(WIDTH, HEIGHT)
    options = profile.options
    tokens = f"{profile.budgets[0].text_tokens} text tokens, {options.new_tokens} new"
    details = f"{profile.backend} · {profile.dtype} · {profile.method} · {tokens} · {statistics(profile)}"
    charts.add_heading(figure, f"{profile.model} at each budget of visual tokens", details)
    _latency(charts.add_axes(figure, 0.9, 1.5, 5.7, 3.7, "Time to first token, ms"), profile, recommendation)
    _stages(charts.add_axes(figure, 7.6, 1.5, 6.0, 3.7, "Where it goes, ms"), profile, recommendation)
    words = memory(profile) if recommendation is None else str(recommendation)
    figure.text(0.4 / WIDTH, 0.4 / HEIGHT, words[0].upper() + words[1:], fontsize=12.5, color=charts.INK)
    charts.save(figure, path)


def _latency(axes: Axes, profile: Profile, recommendation: Recommendation | None) -> None:
    """Median against tokens kept, p10 to p90 as bars; filled where the target is met in the p90."""
    points = sorted(profile.budgets, key=lambda budget: budget.image_tokens)
    places = _places([point.image_tokens for point in points])
    middle = [point.first_token.median for point in points]
    low = [point.first_token.median - point.first_token.p10 for point in points]
    high = [point.first_token.p90 - point.first_token.median for point in points]
    line = charts.BLUE
    axes.errorbar(places, middle, (low, high), color=line, linewidth=2, elinewidth=1.6, capsize=5, zorder=3)
    target = None if recommendation is None else recommendation.target_ms
    late = [target is not None and point.first_token.p90 > target for point in points]
    faces = [charts.PAPER if each else line for each in late]
    axes.scatter(places, middle, s=70, c=faces, edgecolors=line, linewidths=2, zorder=4)
    top = max(point.first_token.p90 for point in points)
    # A target far above everything measured would press the measurements to the floor.
    if target is not None and target < 2 * top:
        axes.axhline(target, color=charts.RED, linewidth=1.6, linestyle=(0, (5, 4)), zorder=2)
        says = f"target {target:,.6g} ms; filled: p90 within it"
        axes.text(1, 1.038, says, color=charts.RED, fontsize=10.5, ha="right", transform=axes.transAxes)
        top = max(top, target)
    for place, point in zip(places, points, strict=True):
        where = (place, point.first_token.p90)
        behind = {"facecolor": charts.PAPER, "edgecolor": "none", "pad": 1.2}
        style = {"ha": "center", "va": "bottom", "fontsize": 11, "color": charts.INK, "zorder": 5, "bbox": behind}
        axes.annotate(_short(point.first_token.median), where, (0, 5), textcoords="offset points", **style)  # type: ignore[arg-type]
    axes.set_ylim(0, 1.18 * top)
    axes.set_xlim(-0.08, 1.08)
    axes.set_xticks(places, [_tokens(point) for point in points])
    axes.set_xlabel("visual tokens kept", fontsize=11, color=charts.MUTED, labelpad=8)
    axes.tick_params(axis="x", pad=8)
    axes.grid(axis="y", color=charts.RULE, linewidth=1)
    axes.tick_params(axis="y", labelcolor=charts.MUTED)
    axes.yaxis.set_major_formatter("{x:,.6g}")
    _mark_chosen(axes.get_xticklabels(), points, recommendation)


def _stages(axes: Axes, profile: Profile, recommendation: Recommendation | None) -> None:
    """A bar of stages for each budget, from few tokens at the top to all."""
    budgets = profile.budgets
    names = [stage for stage in COLOURS if any(stage in budget.stages for budget in budgets)]
    totals = [sum(b.stages[stage].median for stage in names if stage in b.stages) for b in budgets]
    rows = range(len(budgets))
    starts = [0.0 for _ in budgets]
    height = 0.5 if len(budgets) > 3 else 0.36
    for stage in names:
        widths = [b.stages[stage].median if stage in b.stages else 0.0 for b in budgets]
        axes.barh(rows, widths, height, starts, color=COLOURS[stage], label=stage, zorder=3)
        for row, (start, width) in enumerate(zip(starts, widths, strict=True)):
            number, colour = _short(width), charts.PAPER if stage == "prefill" else charts.INK
            if width > (0.025 + 0.014 * len(number)) * max(totals):  # room for it
                at = start + width / 2
                axes.text(at, row, number, ha="center", va="center", fontsize=9.5, color=colour, zorder=5)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for row, (budget, total) in enumerate(zip(budgets, totals, strict=True)):
        says = _short(budget.first_token.median)
        if budget.speedup is not None and budget.budget != ALL:
            says += f"   {budget.speedup.median:.2f}x as fast"
        beside = {"textcoords": "offset points", "va": "center", "fontsize": 11, "color": charts.INK}
        axes.annotate(says, (total, row), (8, 0), **beside)  # type: ignore[arg-type]
        if len(budgets) <= 6:
            token = _short(budget.stages["decode"].median)
            then = f"then {token} ms a token, KV cache {format_size(budget.kv_bytes)}"
            axes.text(0, row + height / 2 + 0.06, then, va="top", fontsize=9.5, color=charts.MUTED)
    axes.set_yticks(list(rows), [str(budget.budget) for budget in budgets])
    spare = max(0, 3 - len(budgets)) / 2  # one bar alone would be a wall
    axes.set_ylim(len(budgets) - 0.35 + spare, -0.5 - spare)
    axes.set_xlim(0, 1.32 * max(totals))
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    below = axes.legend(
        loc="upper left", bbox_to_anchor=(-0.01, -0.04), ncols=len(names), frameon=False, fontsize=11,
        handlelength=1.0, handleheight=1.0, columnspacing=1.6, handletextpad=0.5,
    )  # fmt: skip
    for text in below.get_texts():
        text.set_color(charts.INK)
    _mark_chosen(axes.get_yticklabels(), budgets, recommendation)


def _mark_chosen(labels: Sequence, budgets: Sequence[BudgetProfile], recommendation: Recommendation | None) -> None:
    for label, budget in zip(labels, budgets, strict=True):
        if recommendation is not None and recommendation.budget == budget.budget:
            label.set_color(charts.BLUE)
            label.set_fontweight("bold")


def _places(tokens: Sequence[int]) -> list[float]:
    """Where on a logarithmic axis from 0 to 1 each count goes; evenly spaced where labels would touch."""
    if len(tokens) == 1:
        return [0.5]
    low, high = math.log(tokens[0]), math.log(tokens[-1])
    places = [(math.log(count) - low) / max(high - low, 1e-9) for count in tokens]
    if min(after - before for before, after in pairwise(places)) < CLOSE:
        places = [number / (len(tokens) - 1) for number in range(len(tokens))]
    return places


def _tokens(point: BudgetProfile) -> str:
    return f"{point.image_tokens} (all)" if point.budget == ALL else str(point.image_tokens)


def _short(milliseconds: float) -> str:
    return f"{milliseconds:,.{digits_of(milliseconds)}f}"
