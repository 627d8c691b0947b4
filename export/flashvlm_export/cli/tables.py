"""What an export wrote and what a plan says, as tables and as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from flashvlm.budget import listed
from flashvlm.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from flashvlm_export.exporter import ExportReport
    from flashvlm_export.plan import Plan

WIDTH = 120  # columns of a table that goes to a file or a pipe

# --- an export -----------------------------------------------------------------------------------------------------


def print_report(report: ExportReport, json_output: bool, quiet: bool) -> None:
    """Files, sizes and time on stdout; on stderr what the bundle cannot do."""
    notice = _never_all(report)
    if json_output:
        typer.echo(json.dumps({**report_json(report), "notices": [notice] if notice else []}, indent=1))
    elif not quiet:
        _print_files(report)
    if notice and not quiet:
        typer.echo(f"note: {notice}", err=True)


def report_json(report: ExportReport) -> dict[str, Any]:
    """Plain JSON values; sizes in bytes."""
    manifest = report.manifest
    return {
        "bundle": str(report.out),
        "model": manifest.model.name,
        "dtypes": manifest.model.dtypes.model_dump(),
        "dialect": manifest.dialect,
        "layout": manifest.layout,
        "method": manifest.selection.method,
        "budgets": list(manifest.selection.budgets),
        "image_tokens": manifest.candidates,
        "shortest_question": report.text_tokens,
        "max_seq": manifest.model.max_seq,
        "files": {name: spec.size for name, spec in manifest.files.items()},
        "bytes": sum(spec.size for spec in manifest.files.values()),
        "seconds": round(report.seconds, 3),
        "trace_seconds": round(report.trace_seconds, 3),
        "peak_resident": report.peak_rss,
    }


def _never_all(report: ExportReport) -> str | None:
    """Every bundle offers budget all; one with a short cache cannot keep the promise."""
    model, candidates = report.manifest.model, report.manifest.candidates
    needed = candidates + report.text_tokens
    if needed <= model.max_seq:
        return None
    return (
        f"--budget all never fits this bundle: {candidates} image tokens and the shortest question take "
        f"{needed} of its {model.max_seq} cache slots; for all, export with --max-seq {needed} or more"
    )


def _print_files(report: ExportReport) -> None:
    manifest = report.manifest
    console, table = _console(), _table("file", "size")
    for name, spec in manifest.files.items():
        table.add_row(name, format_size(spec.size))
    console.print(table)
    total = sum(spec.size for spec in manifest.files.values())
    console.print(
        f"{manifest.candidates} image tokens, budgets {listed(manifest.selection.budgets)}; "
        f"{manifest.model.dtypes.weights}; {format_size(total)} in {report.seconds:.1f} s; "
        f"peak memory {format_size(report.peak_rss)}"
    )
    console.print(f"next: flashvlm-run {report.out} --image IMAGE --prompt QUESTION", markup=False)


# --- a plan --------------------------------------------------------------------------------------------------------


def print_plan(found: Plan, json_output: bool) -> None:
    """Sizes of the parts, then a row for each budget."""
    if json_output:
        typer.echo(found.model_dump_json(indent=1))
        return
    console = _console()
    console.print(f"{found.model}, {found.dtype}, {found.dialect} dialect, batch {found.max_batch}", markup=False)
    parts = _table("part", "parameters", "weights", "file", "engine")
    for name, part in found.parts.items():
        files = (format_size(n) if n else "" for n in (part.file_bytes, part.engine_bytes))
        parts.add_row(name, f"{part.parameters / 1e6:,.2f} M", format_size(part.bytes), *files)
    whole = format_size(found.bundle_bytes), format_size(found.engine_bytes)
    parts.add_row("in all", f"{found.parameters / 1e6:,.2f} M", "", *whole)
    console.print(parts)
    kv = found.kv
    console.print(
        f"\nKV cache: {kv.bytes_per_token:,} bytes a token, {format_size(kv.bytes_at_max_positions)} at all "
        f"{kv.max_positions} positions. {found.text_tokens} tokens of text, {found.new_tokens} of answer:"
    )
    rows = _table("budget", "prompt", "prefill FLOPs", "of all", "KV used", "capacity", "KV", "activations", "device")
    for b in found.budgets:
        flops = f"{b.prefill_flops / 1e12:.2f} T" if b.prefill_flops >= 1e11 else f"{b.prefill_flops / 1e9:.2f} G"
        rows.add_row(
            str(b.budget),
            str(b.prompt_tokens),
            flops,
            f"{b.prefill_share:.2f}",
            format_size(b.kv_used),
            str(b.capacity),
            format_size(b.kv_capacity),
            f"~{format_size(b.engine_activations)}",
            f"~{format_size(b.device_total)}",
        )
    console.print(rows)
    console.print(
        f"\ndevice: engines, the cache at its capacity, and activations for a prompt that fills it (an estimate).\n"
        f"beside it: {format_size(found.host_bytes)} of embeddings read from disk; not counted: CUDA, TensorRT, the "
        f"system.\nbuilding the decoder's engine: ~{format_size(found.build_anonymous_bytes)} of memory, "
        f"~{format_size(found.build_peak_bytes)} with its mapped weights (TensorRT-RTX 1.7, docs/measurements.md).\n"
        f"kB, MB and GB are 10^3, 10^6 and 10^9 bytes."
    )


def _console() -> Console:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    return console if console.is_terminal else Console(soft_wrap=True, highlight=False, width=WIDTH)


def _table(*columns: str) -> Table:
    """The first column is a name, the others are numbers."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="left" if column == columns[0] else "right")
    return made
