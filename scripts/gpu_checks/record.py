"""What a section is told and what it finds: the border between the command and the processes it starts.

A section is a function ``run(job, record)``. What it records is on disk at once, so that a section that crashes the
process keeps what it had found before.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


class Skip(Exception):  # noqa: N818 - nothing went wrong
    """A section, or a part of one, that cannot run on this machine: why, and what would change that."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True)
class Job:
    """What a section is told. ``facts`` are those of the sections before it: where the library is, and so on."""

    device: str  # "cuda" or "emulation"
    seed: int
    quick: bool  # a few cases: for the emulation, and under compute-sanitizer
    work: Path  # a folder for what a section leaves to the next
    library: Path | None = None
    plugins: Path | None = None
    bundle: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), default=str), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Job:
        raw = json.loads(path.read_text(encoding="utf-8"))
        paths = {name: raw[name] and Path(raw[name]) for name in ("work", "library", "plugins", "bundle")}
        return cls(**(raw | paths))


class Record:
    """Appends findings to a file, a line each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def check(
        self, name: str, cases: int, worst: float, bound: float, *, passed: bool | None = None, detail: str = ""
    ) -> bool:
        """``worst`` of the cases against ``bound``; NaN never passes. ``passed`` where that is not the whole of it."""
        passed = bool(worst <= bound and cases > 0) if passed is None else passed
        finite = worst if abs(worst) < float("inf") else None  # JSON has no NaN
        self._write("check", name=name, cases=cases, worst=finite, bound=bound, passed=passed, detail=detail)
        return passed

    def timing(self, what: str, dtype: str, batch: int, method: str, microseconds: Sequence[float]) -> float:
        """Returns the median of the runs."""
        ordered = sorted(microseconds)
        median, p10, p90 = (ordered[min(int(len(ordered) * q), len(ordered) - 1)] for q in (0.5, 0.1, 0.9))
        row = {"what": what, "dtype": dtype, "batch": batch, "method": method, "runs": len(ordered)}
        self._write("timing", **row, median=round(median, 3), p10=round(p10, 3), p90=round(p90, 3))
        return median

    def fact(self, name: str, value: Any) -> None:
        self._write("fact", name=name, value=value)

    def skip(self, reason: str, remedy: str = "") -> None:
        self._write("skip", reason=reason, remedy=remedy)

    def error(self, message: str) -> None:
        self._write("error", message=message)

    def _write(self, kind: str, **fields: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **fields}, default=str) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The findings of a section, without the line that a crash may have cut."""
    findings: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError, ValueError), path.open(encoding="utf-8") as file:
        findings.extend(map(json.loads, file))
    return findings
