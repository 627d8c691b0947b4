"""flashvlm-export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashvlm.cli import support
from flashvlm.errors import FlashVLMError, SelectionError

if TYPE_CHECKING:
    from flashvlm_export.exporter import ExportReport
    from flashvlm_export.plan import Plan

app = support.new_app()

PLAN_WIDTH = 120  # columns of a plan that goes to a file or a pipe


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
    model: Annotated[str, _flag("demo, llava-1.5-7b, llava-1.5-13b, a Hub id, or a checkpoint folder.", "--model")],
    out: Annotated[Path | None, _flag("Bundle folder to write.", "--out")] = None,
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
    temperature: Annotated[float, _flag("Sharpness of the relevance term; flashvlm-published has its own.")] = 0.016,
    pool_temperature: Annotated[float, _flag("Softness of pooling over query tokens, of flashvlm only.")] = 1.0,
    eps: Annotated[float, _flag("Floor of saliency and relevance before the logarithm.")] = 1e-6,
    top_ratio: Annotated[float, _flag("Share of the budget taken by score; the rest represents the background.")] = 0.5,
    iterations: Annotated[int, _flag("Lloyd iterations.")] = 4,
    partition_space: Annotated[str, _flag("Space of the partition: features or projected.")] = "features",
    seed: Annotated[int, _flag("Seed of --method random.")] = 0,
    quiet: Annotated[bool, _flag("No progress and no summary.", "--quiet")] = False,
    plan: Annotated[bool, _flag("Only print the memory it takes; reads config.json alone.", "--plan")] = False,
    json: Annotated[bool, _flag("With --plan: print it as JSON.", "--json")] = False,
    max_batch: Annotated[int, _flag("With --plan: largest batch.")] = 1,
    prompt_tokens: Annotated[int, _flag("With --plan: text of the prompt, template included.")] = 40,
    new_tokens: Annotated[int, _flag("With --plan: tokens of an answer.")] = 64,
) -> None:
    """Export a vision-language checkpoint to an ONNX bundle that selects visual tokens by the question."""
    budgets = parse_budgets(budget)
    if plan:
        sizes = (max_seq, max_batch, prompt_tokens, new_tokens)
        _plan(model, budgets, dtype.value, dialect.value, revision, sizes, json)
        return
    if json:
        raise FlashVLMError("--json prints a plan; add --plan")
    if out is None:
        raise FlashVLMError(
            "Missing option '--out', the bundle folder to write; or --plan, to see sizes without one "
            "(see flashvlm-export --help)"
        )
    with support.bars(quiet) as progress:
        starting = progress.start("starting", 1)
        with _installed():
            from flashvlm_export.exporter import ExportOptions
            from flashvlm_export.exporter import export as run_export
            from flashvlm_export.selection.flashvlm import SelectionParams
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


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:  # also what a version too old or a broken install lead to, hence the reason
        raise FlashVLMError(
            f"{error.name} is not installed or does not import ({error}); "
            f"install it with: pip install --upgrade 'flashvlm[export]'"
        ) from None


def _plan(
    model: str,
    budgets: tuple[int, ...],
    dtype: Any,
    dialect: Any,
    revision: str | None,
    sizes: tuple[int | None, int, int, int],
    json: bool,
) -> None:
    max_seq, max_batch, prompt_tokens, new_tokens = sizes
    for name, size in zip(("max-batch", "prompt-tokens", "new-tokens"), sizes[1:], strict=True):
        if size is not None and size < 1:
            raise FlashVLMError(f"--{name} {size}: expected at least 1")
    with support.waiting("planning"), _installed():
        from flashvlm_export.plan import PlanOptions
        from flashvlm_export.plan import plan as run_plan

        found = run_plan(
            PlanOptions(model, budgets, dtype, max_seq, max_batch, dialect, prompt_tokens, new_tokens, revision)
        )
    if json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        _print_plan(found)


def _print_plan(found: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    size = support.megabytes
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console = Console(soft_wrap=True, highlight=False, width=PLAN_WIDTH)

    def table(*columns: str) -> Table:
        made = Table(box=None, pad_edge=False)
        for column in columns:
            made.add_column(column, justify="left" if column == columns[0] else "right")
        return made

    console.print(f"{found.model}, {found.dtype}, {found.dialect} dialect, batch {found.max_batch}")
    parts = table("part", "parameters", "weights", "file", "engine")
    for name, part in found.parts.items():
        files = (size(n) if n else "" for n in (part.file_bytes, part.engine_bytes))
        parts.add_row(name, f"{part.parameters / 1e6:,.2f} M", size(part.bytes), *files)
    parts.add_row("in all", f"{found.parameters / 1e6:,.2f} M", "", size(found.bundle_bytes), size(found.engine_bytes))
    console.print(parts)
    kv = found.kv
    console.print(
        f"\nKV cache: {kv.bytes_per_token:,} bytes a token, {size(kv.bytes_at_max_positions)} at all "
        f"{kv.max_positions} positions. {found.text_tokens} tokens of text, {found.new_tokens} of answer:"
    )
    rows = table("budget", "prompt", "prefill FLOPs", "of all", "KV used", "capacity", "KV", "activations", "device")
    for b in found.budgets:
        flops = f"{b.prefill_flops / 1e12:.2f} T" if b.prefill_flops >= 1e11 else f"{b.prefill_flops / 1e9:.2f} G"
        sizes = (size(b.kv_capacity), "~" + size(b.engine_activations), "~" + size(b.device_total))
        share = f"{b.prefill_share:.2f}"
        rows.add_row(str(b.budget), str(b.prompt_tokens), flops, share, size(b.kv_used), str(b.capacity), *sizes)
    console.print(rows)
    console.print(
        f"\ndevice: engines, the cache at its capacity, and activations for a prompt that fills it (an estimate).\n"
        f"beside it: {size(found.host_bytes)} of embeddings mapped from disk; not counted: CUDA, TensorRT, the system."
        f"\nbuilding the decoder's engine: ~{size(found.build_anonymous_bytes)} of memory, "
        f"~{size(found.build_peak_bytes)} with its mapped weights (TensorRT-RTX 1.7, docs/measurements.md)."
    )


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
        table.add_row(name, support.megabytes(spec.size))
    console = Console(soft_wrap=True)
    console.print(table)
    total = sum(spec.size for spec in manifest.files.values())
    budgets = ", ".join(map(str, (*manifest.selection.budgets, "all")))
    console.print(
        f"{manifest.model.num_image_tokens} image tokens, budgets {budgets}; {manifest.model.dtype}; "
        f"{support.megabytes(total)} in {report.seconds:.1f} s; peak memory {report.peak_rss / 2**20:.0f} MiB",
        highlight=False,
    )
    console.print(f"next: flashvlm-run {report.out} --image IMAGE --prompt QUESTION", highlight=False)


def main() -> None:
    support.run(app, "flashvlm-export")


if __name__ == "__main__":
    main()
