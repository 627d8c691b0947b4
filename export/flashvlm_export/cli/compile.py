"""flashvlm-compile."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashvlm.cli import options, support
from flashvlm.errors import FlashVLMError
from flashvlm.sizes import format_size

if TYPE_CHECKING:
    from flashvlm_export.compile.engines import CompileReport

app = support.new_app()


class TargetName(str, Enum):
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


@app.command()
def compile(
    bundle: options.BundleFolder,
    target: Annotated[TargetName, typer.Option(help="Compiler and runtime.")] = TargetName.tensorrt,
    compute_capability: Annotated[
        str | None, typer.Option(help="GPUs to build for with tensorrt-rtx, such as 8.9 or 8.9,12.0.")
    ] = None,
    max_seq: Annotated[int | None, typer.Option(help="KV slots; 4096 if not given, or what an image needs.")] = None,
    max_batch: Annotated[int, typer.Option(help="Largest batch.")] = 1,
    max_query: Annotated[int, typer.Option(help="Longest question, in tokens.")] = 512,
    workspace: Annotated[float | None, typer.Option(help="Memory the compiler may use on the GPU, in GB.")] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="0 builds fastest, 5 runs fastest.")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File to keep measured timings in, for faster builds.")
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Let weights stay in host memory.")
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Leave weights out; refit when loading.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engines that later versions load too.")
    ] = False,
    plugins: options.Plugins = None,
    force: Annotated[bool, typer.Option("--force", help="Build again what still matches.")] = False,
    json_output: options.Json = False,
    version: options.Version = False,
) -> None:
    """Build TensorRT engines for every graph of a bundle."""
    from flashvlm_export.compile.engines import CompileOptions, compile_bundle

    wanted = CompileOptions(
        bundle=bundle,
        target=target.value,
        compute_capabilities=_capabilities(compute_capability),
        max_seq=max_seq,
        max_batch=max_batch,
        max_query=max_query,
        workspace=_workspace(workspace),
        optimization_level=optimization_level,
        timing_cache=timing_cache,
        weight_streaming=weight_streaming,
        strip_weights=strip_weights,
        version_compatible=version_compatible,
        plugins=plugins,
        force=force,
    )
    with support.bars() as progress:
        report = compile_bundle(wanted, progress.start)
    _print_json(report) if json_output else _summary(report)


def _workspace(gigabytes: float | None) -> int | None:
    """GB -> bytes."""
    if gigabytes is None:
        return None
    if not 0 < gigabytes < 1e6:  # also refuses NaN
        raise FlashVLMError(f"--workspace {gigabytes}: expected GB above 0 and under {10**6:,}")
    return round(gigabytes * 1e9)


def _capabilities(text: str | None) -> tuple[str, ...]:
    """``8.9,12.0`` -> its parts, each major.minor."""
    if text is None:
        return ()
    parts = tuple(part.strip() for part in text.split(","))
    for part in parts:
        major, dot, minor = part.partition(".")
        if not (dot and part.isascii() and len(major) <= 2 and major.isdigit() and len(minor) == 1 and minor.isdigit()):
            raise FlashVLMError(f"--compute-capability {part!r}: expected major.minor, such as 8.9")
    return parts


def _print_json(report: CompileReport) -> None:
    """The engines' manifest, and how it came about."""
    values = {"folder": str(report.folder), "seconds": round(report.seconds, 3), "reused": list(report.reused)}
    typer.echo(json.dumps({**values, **report.manifest.model_dump(mode="json")}, indent=1))


def _summary(report: CompileReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("engine", "size", "seconds", "peak memory"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name, engine in report.manifest.engines.items():
        seconds = "reused" if name in report.reused else f"{engine.build_seconds:.1f}"
        table.add_row(name, format_size(engine.size), seconds, format_size(engine.peak_rss))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"{report.folder} in {report.seconds:.1f} s", highlight=False)


def main() -> None:
    support.run(app, "flashvlm-compile")


if __name__ == "__main__":
    main()
