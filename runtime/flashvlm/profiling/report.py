"""A profile as a table, as JSON and as a picture; a folder of them is written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from flashvlm.cli.support import megabytes
from flashvlm.errors import FlashVLMError
from flashvlm.files import refuse_link
from flashvlm.kept_picture import INK, MARGIN, MUTED, PANEL, PAPER, RULE, Rgb
from flashvlm.profiling.measure import STAGES, BudgetProfile, Profile, Recommendation, Spread
from flashvlm.profiling.trtexec import over_layers

JSON_FILE, PICTURE_FILE, TRTEXEC_FOLDER = "profile.json", "profile.png", "trtexec"
SCHEMA_VERSION = 1
LAYER_DEPTH, LAYER_ROWS = 4, 8  # of the table; the JSON has every path

# --- folder --------------------------------------------------------------------------------------------------------


def check_out(out: Path, force: bool) -> None:
    """Refuses a place that cannot be written, or that holds anything but an earlier report."""
    if not out.resolve().parent.is_dir():
        raise FlashVLMError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    refuse_link(out)
    if not os.path.lexists(out):
        return
    if not force:
        raise FlashVLMError(f"--out {out} exists; choose another name, or add --force to replace an earlier report")
    ours = {JSON_FILE, PICTURE_FILE, TRTEXEC_FOLDER}
    if not out.is_dir() or not {path.name for path in out.iterdir()} <= ours:
        raise FlashVLMError(f"--out {out}: --force replaces only reports, and this holds other files; move it away")


def write(profile: Profile, recommendation: Recommendation | None, folder: Path) -> None:
    """``profile.json`` and ``profile.png`` into a folder that exists."""
    text = json.dumps(to_json(profile, recommendation), indent=1)
    (folder / JSON_FILE).write_text(text + "\n", encoding="utf-8")
    draw(profile, recommendation).save(folder / PICTURE_FILE)


def to_json(profile: Profile, recommendation: Recommendation | None) -> dict[str, Any]:
    """Plain JSON values. Milliseconds unless a name says otherwise; a spread is {median, p10, p90}."""
    values = {"schema_version": SCHEMA_VERSION, **asdict(profile), "recommendation": None}
    for entry, budget in zip(values["budgets"], profile.budgets, strict=True):
        entry["tokens_per_second"] = budget.tokens_per_second
    if recommendation is not None:
        values["recommendation"] = {**asdict(recommendation), "statistic": "first_token.p90"}
    return _rounded(values)


def _rounded(value: Any) -> Any:
    """Floats to six digits behind the point: nanoseconds, for milliseconds."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


# --- table ---------------------------------------------------------------------------------------------------------


def print_table(profile: Profile, recommendation: Recommendation | None, console: Console) -> None:
    """A column for each budget, a row for each stage; then memory, layers and the recommendation."""
    table = Table(box=None, pad_edge=False)
    table.add_column("budget")
    for budget in profile.budgets:
        table.add_column(str(budget.budget), justify="right")
    for label, cell in _rows(profile):
        table.add_row(label, *(cell(budget) for budget in profile.budgets))
    console.print(table)
    console.print(f"milliseconds, {statistics(profile)}; {profile.backend}", highlight=False)
    console.print(_memory(profile), highlight=False)
    for job, sums in profile.layers.items():
        _print_layers(job, sums, console)
    if recommendation is not None:
        console.print(str(recommendation), highlight=False)


def _rows(profile: Profile) -> Iterator[tuple[str, Callable[[BudgetProfile], str]]]:
    """Label and cell of each row; times are milliseconds."""
    yield "tokens", lambda b: f"{b.text_tokens} text + {b.image_tokens}"
    for stage in STAGES[:-1]:
        if any(stage in budget.stages for budget in profile.budgets):
            yield stage, lambda b, stage=stage: spread(b.stages.get(stage))  # type: ignore[misc]
    yield "first token", lambda b: spread(b.first_token)
    if any(budget.speedup for budget in profile.budgets):
        yield "  all/this", lambda b: spread(b.speedup, 2)
    if any("fused" in budget.stages for budget in profile.budgets):
        yield "  one graph", lambda b: spread(b.stages.get("fused"))
    yield "decode/token", lambda b: spread(b.stages["decode"])
    yield "tokens/s", lambda b: f"{b.tokens_per_second:.1f}"
    yield f"{profile.options.new_tokens} tokens", lambda b: spread(b.answer)
    yield "KV cache", lambda b: megabytes(b.kv_bytes)


def _print_layers(job: str, sums: dict[str, float], console: Console) -> None:
    total = sum(sums.values())
    table = Table(box=None, pad_edge=False)
    for column, justify in ((job, "left"), ("ms", "right"), ("%", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    groups = list(over_layers(sums, LAYER_DEPTH).items())
    rest = sum(milliseconds for _, milliseconds in groups[LAYER_ROWS:])
    for path, milliseconds in [*groups[:LAYER_ROWS], *([("others", rest)] if rest else [])]:
        table.add_row(path, f"{milliseconds:.3f}", f"{100 * milliseconds / total if total else 0:.1f}")
    console.print()
    console.print(table)


def spread(value: Spread | None, digits: int | None = None) -> str:
    """``12.3 (11.9-13.0)``: median and p10 to p90."""
    if value is None:
        return "-"
    digits = _digits(value.median) if digits is None else digits
    return f"{value.median:.{digits}f} ({value.p10:.{digits}f}-{value.p90:.{digits}f})"


def _digits(value: float) -> int:
    """Digits behind the point that leave three in all."""
    return 2 if value < 9.995 else 1 if value < 99.95 else 0


def _memory(profile: Profile) -> str:
    disk = f"graphs and weights on disk {megabytes(profile.disk_bytes)}"
    peak = profile.peak_resident
    return disk if peak is None else f"{disk}; peak resident memory {megabytes(peak)}"


def statistics(profile: Profile) -> str:
    order = "budgets in turn" if profile.interleaved else "one graph after the other"
    return f"median (p10-p90) of {profile.options.runs} runs, {order}"


# --- picture -------------------------------------------------------------------------------------------------------

SCALE = 2  # drawn twice as large and reduced: Pillow's own lines have no smooth edges
PLOT = 380  # height of a panel's plot; lengths are pixels of the finished picture
# Of Okabe and Ito's palette, apart for every kind of colour vision.
COLOURS: dict[str, Rgb] = {
    "preprocess": (176, 182, 192),
    "vision": (86, 180, 233),
    "select": (240, 150, 0),
    "prefill": (0, 130, 100),
}
LINE, TARGET = (0, 114, 178), (204, 68, 0)


class Pen:
    """Pillow's drawing in pixels of the finished picture."""

    def __init__(self, width: int, height: int) -> None:
        self.page = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self._draw = ImageDraw.Draw(self.page)

    def text(self, x: float, y: float, text: str, fill: Rgb, size: int, anchor: str) -> None:
        self._draw.text((x * SCALE, y * SCALE), text, fill, ImageFont.load_default(size * SCALE), anchor)

    def line(self, points: Sequence[tuple[float, float]], fill: Rgb, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(scaled, fill, round(width * SCALE), joint="curve")

    def box(self, left: float, top: float, right: float, bottom: float, fill: Rgb) -> None:
        if (right - left) * SCALE < 1:
            return
        self._draw.rectangle((left * SCALE, top * SCALE, right * SCALE - 1, bottom * SCALE - 1), fill)

    def dot(self, x: float, y: float, radius: float, fill: Rgb, outline: Rgb) -> None:
        corners = [(x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE]
        self._draw.ellipse(corners, fill, outline, width=round(2.5 * SCALE))

    def finished(self) -> Image.Image:
        size = self.page.width // SCALE, self.page.height // SCALE
        return self.page.resize(size, Image.Resampling.LANCZOS)


def text_width(text: str, size: int) -> float:
    return float(ImageFont.load_default(size * SCALE).getlength(text)) / SCALE


def draw(profile: Profile, recommendation: Recommendation | None = None) -> Image.Image:
    """Two panels, the time to first token against the budget and what it is made of, under a title."""
    top = MARGIN + 134
    pen = Pen(2 * PANEL + 3 * MARGIN, top + PLOT + 132 + MARGIN)
    pen.text(MARGIN, MARGIN + 26, f"{profile.model} at each budget of visual tokens", INK, 28, "ls")
    options = profile.options
    tokens = f"{profile.budgets[0].text_tokens} text tokens, {options.new_tokens} new"
    details = f"{profile.backend} · {profile.dtype} · {profile.method} · {tokens} · {statistics(profile)}"
    pen.text(MARGIN, MARGIN + 54, details, MUTED, 17, "ls")
    right = 2 * MARGIN + PANEL
    pen.text(MARGIN, top - 22, "Time to first token, ms", INK, 22, "ls")
    pen.text(right, top - 22, "Where it goes, ms", INK, 22, "ls")
    _latency_panel(pen, MARGIN, top, profile, recommendation)
    _stage_panel(pen, right, top, profile, recommendation)
    y = top + PLOT + 84
    pen.line([(MARGIN, y), (right + PANEL, y)], RULE, 1)
    words = _memory(profile) if recommendation is None else str(recommendation)
    pen.text(MARGIN, y + 36, words[0].upper() + words[1:], INK, 20, "ls")
    return pen.finished()


def _latency_panel(pen: Pen, left: int, top: int, profile: Profile, recommendation: Recommendation | None) -> None:
    target = None if recommendation is None else recommendation.target_ms
    highest = max(budget.first_token.p90 for budget in profile.budgets)
    # A target far above everything measured would press the measurements to the floor.
    shown = target is not None and target < 2 * highest
    ticks = _ticks(max(highest, target) if shown and target is not None else highest)
    x0, x1, bottom = left + 58, left + PANEL, top + PLOT

    def height(milliseconds: float) -> float:
        return bottom - PLOT * milliseconds / ticks[-1]

    for tick in ticks:
        pen.line([(x0, height(tick)), (x1, height(tick))], RULE if tick else MUTED, 1)
        pen.text(x0 - 12, height(tick), f"{tick:,.6g}", MUTED, 17, "rm")
    points = sorted(profile.budgets, key=lambda b: b.image_tokens)
    places = _places([b.image_tokens for b in points], x0 + 44, x1 - 44)
    if shown and target is not None:
        for dash in range(x0, x1, 14):
            pen.line([(dash, height(target)), (min(dash + 8, x1), height(target))], TARGET, 2)
        pen.text(x1, top - 22, f"- - target {target:g} ms; filled: p90 within it", TARGET, 17, "rs")
    pen.line([(x, height(b.first_token.median)) for x, b in zip(places, points, strict=True)], LINE, 2.5)
    for x, budget in zip(places, points, strict=True):
        first = budget.first_token
        pen.line([(x, height(first.p10)), (x, height(first.p90))], LINE, 2)
        for end in (first.p10, first.p90):
            pen.line([(x - 8, height(end)), (x + 8, height(end))], LINE, 2)
        late = target is not None and first.p90 > target
        pen.dot(x, height(first.median), 7, PAPER if late else LINE, LINE)
        label, y = _short(first.median), height(first.p90) - 10
        pen.box(x - text_width(label, 19) / 2 - 3, y - 16, x + text_width(label, 19) / 2 + 3, y + 3, PAPER)
        pen.text(x, y, label, INK, 19, "ms")
        chosen = recommendation is not None and recommendation.budget == budget.budget
        label = f"{budget.image_tokens} (all)" if budget.budget == "all" else str(budget.budget)
        pen.text(x, bottom + 14, label, LINE if chosen else INK, 19, "mt")
    pen.text((x0 + x1) / 2, bottom + 42, "visual tokens kept", MUTED, 17, "mt")


def _stage_panel(pen: Pen, left: int, top: int, profile: Profile, recommendation: Recommendation | None) -> None:
    names = [stage for stage in COLOURS if any(stage in budget.stages for budget in profile.budgets)]
    sums = [sum(b.stages[s].median for s in names if s in b.stages) for b in profile.budgets]
    x0, scale = left + 58, (PANEL - 58 - 160) / max(sums)
    row = PLOT / len(profile.budgets)
    bar = min(44.0, 0.5 * row)
    for number, budget in enumerate(profile.budgets):
        y = top + row * (number + 0.5) - 10
        chosen = recommendation is not None and recommendation.budget == budget.budget
        pen.text(x0 - 12, y, str(budget.budget), LINE if chosen else INK, 19, "rm")
        x = float(x0)
        for stage in names:
            if stage not in budget.stages:
                continue
            width = scale * budget.stages[stage].median
            pen.box(x, y - bar / 2, x + width, y + bar / 2, COLOURS[stage])
            label = _short(budget.stages[stage].median)
            if text_width(label, 16) + 10 < width:
                pen.text(x + width / 2, y, label, PAPER if stage == "prefill" else INK, 16, "mm")
            x += width
        pen.text(x + 10, y, first := _short(budget.first_token.median), INK, 19, "lm")
        if budget.speedup is not None and budget.budget != "all":
            pen.text(x + 20 + text_width(first, 19), y, f"{budget.speedup.median:.2f}x as fast", MUTED, 17, "lm")
        if row >= 56:
            then = (
                f"then {spread(budget.stages['decode']).split()[0]} ms a token, KV cache {megabytes(budget.kv_bytes)}"
            )
            pen.text(x0, y + bar / 2 + 8, then, MUTED, 16, "lt")
    x = float(x0)
    for stage in names:
        pen.box(x, top + PLOT + 16, x + 18, top + PLOT + 34, COLOURS[stage])
        pen.text(x + 26, top + PLOT + 25, stage, INK, 17, "lm")
        x += 26 + text_width(stage, 17) + 24


def _places(tokens: Sequence[int], left: float, right: float) -> list[float]:
    """Where on a logarithmic axis each count goes; evenly spaced where labels would touch."""
    if len(tokens) == 1:
        return [(left + right) / 2]
    low, high = math.log(tokens[0]), math.log(tokens[-1])
    places = [left + (right - left) * (math.log(n) - low) / max(high - low, 1e-9) for n in tokens]
    if min(b - a for a, b in pairwise(places)) < 60:
        places = [left + (right - left) * i / (len(tokens) - 1) for i in range(len(tokens))]
    return places


def _ticks(highest: float) -> list[float]:
    """0 to just above ``highest``, in 4 to 8 steps of 1, 2 or 5 times a power of ten."""
    rough = highest * 1.08 / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(step * i, 10) for i in range(math.ceil(highest * 1.08 / step) + 1)]


def _short(milliseconds: float) -> str:
    return f"{milliseconds:,.{_digits(milliseconds)}f}"
