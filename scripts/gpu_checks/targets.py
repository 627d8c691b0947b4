"""What is hoped for on an H200 at N 576, D 4096, L 64, K 64, beside what was measured."""

from __future__ import annotations

from typing import Any

from . import names

GPU = "H200"
MICROSECONDS = {names.SELECTION: 60.0, names.SCORE: 15.0}
TIMES_FASTER = 50.0


def evaluate(timings: list[dict[str, Any]], gpu: str) -> list[dict[str, Any]]:
    """``met`` is None on another GPU: the targets are for that one.

    Speed-up: the published method's operations in torch eager over the whole selection with a cold cache, the slower
    of the two ways of timing it.
    """
    median = {(t["what"], t["dtype"], t["batch"], t["method"]): t["median"] for t in timings}
    rows = []

    def row(name: str, value: float, target: float, unit: str, met: bool) -> None:
        judged = met if GPU in gpu else None
        rows.append({"name": name, "value": round(value, 2), "target": target, "unit": unit, "met": judged})

    for (what, dtype, batch, method), value in median.items():
        if batch == 1 and what in MICROSECONDS and method in (names.HOT, names.COLD):
            limit = MICROSECONDS[what]
            row(f"{what}, {dtype}, {method}: at most", value, limit, "us", value <= limit)
    for dtype in dict.fromkeys(t["dtype"] for t in timings):
        ours = median.get((names.SELECTION, dtype, 1, names.COLD))
        published = median.get((names.PUBLISHED, dtype, 1, names.LAUNCHES))
        if ours and published:
            ratio = published / ours
            row(
                f"published operations in torch eager, {dtype}: at least",
                ratio,
                TIMES_FASTER,
                "x",
                ratio >= TIMES_FASTER,
            )
    return rows
