"""flashvlm-export."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashvlm import cli_support
from flashvlm.errors import FlashVLMError, SelectionError

if TYPE_CHECKING:
    from flashvlm_export.exporter import ExportReport

app = cli_support.new_app()


class Query(str, Enum):
    question = "question"
    prompt = "prompt"


class Positions(str, Enum):
    renumber = "renumber"
    keep = "keep"


class Dtype(str, Enum):
    auto = "auto"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Layout(str, Enum):
    split = "split"  # type: ignore[assignment]
    fused = "fused"


class DialectOption(str, Enum):
    modern = "modern"
    legacy = "legacy"


def _flag(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text)


@app.command()
def export(
    model: Annotated[str, _flag("llava-1.5-7b, llava-1.5-13b, a Hub id, or a checkpoint folder.", "--model")],
    out: Annotated[Path, _flag("Bundle folder to write.", "--out")],
    budget: Annotated[str, _flag("Visual tokens to keep: 64, a list 64,128, or all.", "--budget")] = "64",
    method: Annotated[str, _flag("Selection method.", "--method")] = "flashvlm",
    query: Annotated[
        Query, _flag("Text that guides the selection: the user's question or the whole prompt.")
    ] = Query.question,
    positions: Annotated[Positions, _flag("Position ids of kept tokens.")] = Positions.renumber,
    dtype: Annotated[Dtype, _flag("Weights and activations; auto takes the checkpoint's.")] = Dtype.auto,
    max_seq: Annotated[int | None, _flag("KV-cache capacity in tokens; the model's maximum if not given.")] = None,
    layout: Annotated[Layout, _flag("fused adds one graph for the whole time to first token.")] = Layout.split,
    dialect: Annotated[
        DialectOption, _flag("Operators: modern, or legacy for TensorRT 10.3 (JetPack 6.2).")
    ] = DialectOption.modern,
    revision: Annotated[str | None, _flag("Branch, tag or commit on the Hub.")] = None,
    force: Annotated[bool, _flag("Replace an existing bundle.", "--force")] = False,
    eta: Annotated[float, _flag("Weight of the question against saliency, 0 to 1.")] = 0.5,
    temperature: Annotated[float, _flag("Sharpness of the relevance term.")] = 0.004,
    pool_temperature: Annotated[float, _flag("Sharpness of pooling over query tokens.")] = 0.05,
    eps: Annotated[float, _flag("Floor of saliency and relevance before the logarithm.")] = 1e-6,
    top_ratio: Annotated[float, _flag("Share of the budget taken by score; the rest represents the background.")] = 0.5,
    iterations: Annotated[int, _flag("Lloyd iterations.")] = 4,
    partition_space: Annotated[str, _flag("Space of the partition: features or projected.")] = "features",
    seed: Annotated[int, _flag("Seed of --method random.")] = 0,
    quiet: Annotated[bool, _flag("No progress and no summary.", "--quiet")] = False,
) -> None:
    """Export a vision-language checkpoint to an ONNX bundle that selects visual tokens by the question."""
    budgets = parse_budgets(budget)
    with cli_support.bars(quiet) as progress:
        starting = progress.start("starting", 1)
        try:
            from flashvlm_export.exporter import ExportOptions
            from flashvlm_export.exporter import export as run_export
            from flashvlm_export.selection import SelectionParams
        except ImportError as error:  # also what a version too old or a broken install lead to, hence the reason
            raise FlashVLMError(
                f"{error.name} is not installed or does not import ({error}); "
                f"install it with: pip install --upgrade 'flashvlm[export]'"
            ) from None
        starting(1)
        params = SelectionParams(
            eta=eta,
            temperature=temperature,
            pool_temperature=pool_temperature,
            eps=eps,
            top_ratio=top_ratio,
            iterations=iterations,
            partition_space=partition_space,
            seed=seed,
        )
        options = ExportOptions(
            model=model,
            out=out,
            budgets=budgets,
            method=method,
            params=params,
            query=query.value,
            positions=positions.value,
            dtype=dtype.value,
            max_seq=max_seq,
            layout=layout.value,
            dialect=dialect.value,
            revision=revision,
            force=force,
        )
        report = run_export(options, progress)
    if not quiet:
        _summary(report)


def parse_budgets(text: str) -> tuple[int, ...]:
    """``64``, ``64,128`` or ``all`` -> token counts in ascending order; ``all`` needs no graph of its own."""
    budgets = set()
    for part in (p.strip() for p in text.split(",")):
        if part == "all":
            continue
        try:
            value = int(part)
        except ValueError:
            raise SelectionError(f"--budget {part!r}: expected a whole number of tokens, or all") from None
        if value <= 0:
            raise SelectionError(f"--budget {value}: expected at least 1 token, or all")
        budgets.add(value)
    return tuple(sorted(budgets))


def _summary(report: ExportReport) -> None:
    from rich.console import Console
    from rich.table import Table

    manifest = report.manifest
    table = Table(box=None, pad_edge=False)
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, spec in manifest.files.items():
        table.add_row(name, cli_support.megabytes(spec.size))
    console = Console(soft_wrap=True)
    console.print(table)
    total = sum(spec.size for spec in manifest.files.values())
    budgets = ", ".join(map(str, (*manifest.selection.budgets, "all")))
    console.print(
        f"{manifest.model.num_image_tokens} image tokens, budgets {budgets}; {manifest.model.dtype}; "
        f"{cli_support.megabytes(total)} in {report.seconds:.1f} s; peak memory {report.peak_rss / 2**20:.0f} MiB",
        highlight=False,
    )
    console.print(f"next: flashvlm-run {report.out} --image IMAGE --prompt QUESTION", highlight=False)


def main() -> None:
    cli_support.run(app, "flashvlm-export")


if __name__ == "__main__":
    main()
