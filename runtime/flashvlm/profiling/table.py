"""A profile as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from flashvlm.profiling.measure import STAGES, BudgetProfile, Profile, Recommendation, Spread
from flashvlm.profiling.trtexec_json import over_layers
from flashvlm.sizes import format_size

SCHEMA_VERSION = 1
LAYER_DEPTH, LAYER_ROWS = 4, 8  # of the table; the JSON has every path


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
    console.print(memory(profile), highlight=False)
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
    yield "KV cache", lambda b: format_size(b.kv_bytes)


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
    """``12.3 (11.9-13.0)``: median and p10 to p90; the median alone where they are no different."""
    if value is None:
        return "-"
    digits = digits_of(value.median) if digits is None else digits
    middle, low, high = (f"{number:.{digits}f}" for number in (value.median, value.p10, value.p90))
    return middle if low == middle == high else f"{middle} ({low}-{high})"


def digits_of(value: float) -> int:
    """Digits behind the point that leave three in all."""
    return 2 if value < 9.995 else 1 if value < 99.95 else 0


def memory(profile: Profile) -> str:
    disk = f"graphs and weights on disk {format_size(profile.disk_bytes)}"
    peak = profile.peak_resident
    return disk if peak is None else f"{disk}; peak resident memory {format_size(peak)}"


def statistics(profile: Profile) -> str:
    order = "budgets in turn" if profile.interleaved else "one graph after the other"
    runs = profile.options.runs
    return f"one run, {order}" if runs == 1 else f"median (p10-p90) of {runs} runs, {order}"
