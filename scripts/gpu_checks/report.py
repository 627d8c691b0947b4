"""The report as tables: in the terminal by rich where it is installed, as Markdown otherwise and in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

QUANTILES = ("median", "p10", "p90")
JSON, MARKDOWN = "gpu-check.json", "gpu-check.md"


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numbers: int  # columns on the right that hold numbers


def save(report: dict[str, Any], folder: Path) -> None:
    """Both files, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((JSON, json.dumps(report, indent=1) + "\n"), (MARKDOWN, markdown(report))):
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def headline(report: dict[str, Any]) -> str:
    checks = [check for section in report["sections"] for check in section["checks"]]
    good = sum(check["passed"] for check in checks)
    trouble = [
        f"{section['name']} {section['status']}"
        for section in report["sections"]
        if section["status"] not in ("passed", "skipped") and not section["comparison"]
    ]
    skipped = sum(section["status"] == "skipped" for section in report["sections"])
    verdict = "passed" if report["passed"] else "FAILED"
    parts = [f"{verdict}: {good} of {len(checks)} checks", f"{skipped} sections skipped", *trouble]
    return f"{report['machine'].get('device', 'unknown device')}. {', '.join(parts)}. {report['seconds']:.0f} s."


def tables(report: dict[str, Any]) -> list[Table]:
    sections = report["sections"]
    every = {
        kind: [(section["name"], row) for section in sections for row in section[kind]]
        for kind in ("checks", "timings", "skipped")
    }
    found = [
        Table("Machine", ("what", "found"), _machine(report["machine"]), 0),
        Table(
            "Checks",
            ("section", "check", "result", "cases", "worst", "bound"),
            [
                (name, _with(c["name"], c["detail"]), "passed" if c["passed"] else "FAILED", str(c["cases"]),
                 "not finite" if c["worst"] is None else f"{c['worst']:.3g}", f"{c['bound']:.3g}")
                for name, c in every["checks"]
            ],
            3,
        ),
        Table(
            "Targets",
            ("target", "met", "measured", "wanted"),
            [
                (t["name"], {None: "other GPU", True: "yes", False: "NO"}[t["met"]], f"{t['value']:.1f} {t['unit']}",
                 f"{t['target']:g} {t['unit']}")
                for t in report.get("targets", ())
            ],
            2,
        ),
        Table(
            "Microseconds",
            ("what", "dtype", "batch", "how", *QUANTILES),
            [
                (t["what"], t["dtype"], str(t["batch"]), t["method"], *(f"{t[q]:.1f}" for q in QUANTILES))
                for _, t in every["timings"]
            ],
            3,
        ),
        Table("Not run", ("section", "why", "remedy"), [(n, s["reason"], s["remedy"]) for n, s in every["skipped"]], 0),
        Table(
            "Troubles",
            ("section", "status", "last words"),
            [(s["name"], s["status"], s["error"]) for s in sections if s["error"]],
            0,
        ),
    ]  # fmt: skip
    return [table for table in found if table.rows]


def _with(name: str, detail: str) -> str:
    return f"{name} ({detail})" if detail else name


def _machine(machine: dict[str, Any]) -> list[tuple[str, ...]]:
    gpu, versions = machine.get("gpu") or {}, machine.get("versions", {})
    rows = {
        "device": machine.get("device"),
        "compute capability": gpu.get("compute_capability"),
        "multiprocessors": gpu.get("sm_count"),
        "memory": gpu and f"{gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['l2_bytes'] / 2**20:.0f} MiB of L2 cache",
        "driver": gpu and f"{gpu['driver']}, CUDA {gpu['cuda_of_driver']}",
        "nvcc": machine.get("nvcc"),
        "processor": machine.get("processor"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [(name, str(value)) for name, value in rows.items() if value]


def markdown(report: dict[str, Any]) -> str:
    lines = ["# GPU check", "", headline(report), "", f"Random inputs from seed {report['seed']}.", ""]
    for table in tables(report):
        left = len(table.columns) - table.numbers
        rule = ["---"] * left + ["---:"] * table.numbers
        lines += [f"## {table.title}", ""]
        for row in (table.columns, rule, *table.rows):
            lines.append("| " + " | ".join(_cell(cell) for cell in row) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def show(report: dict[str, Any]) -> None:
    """Prints the tables."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as Rich
    except ImportError:
        print(markdown(report))
        return
    console = Console()
    for table in tables(report):
        rich = Rich(title=table.title, title_justify="left", box=None, pad_edge=False)
        for i, column in enumerate(table.columns):
            rich.add_column(column, justify="right" if i >= len(table.columns) - table.numbers else "left")
        for row in table.rows:
            rich.add_row(*(escape(cell) for cell in row))
        console.print(rich)
        console.print()
    console.print(headline(report), markup=False, highlight=False)
