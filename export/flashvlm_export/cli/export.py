"""flashvlm-export."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from flashvlm.budget import ALL, parse_budgets
from flashvlm.cli import options, support
from flashvlm.errors import FlashVLMError
from flashvlm.extras import install

app = support.new_app()


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
    model: Annotated[str, _flag("demo, a short name (llava-1.5-7b), a Hub id, or a checkpoint folder.", "--model")],
    out: Annotated[Path | None, _flag("Bundle folder to write.", "--out")] = None,
    budget: Annotated[
        str, _flag("Visual tokens to keep: 64, a list such as 64,128 whose first is later the default, or all.")
    ] = "64",
    method: Annotated[str, _flag("Selection method.", "--method")] = "flashvlm",
    query: Annotated[
        Query, _flag("Text that guides the selection: the user's question or the whole prompt.")
    ] = Query.question,
    positions: Annotated[
        Positions | None, _flag("Position ids of kept tokens; renumber, or keep where positions have several axes.")
    ] = None,
    dtype: Annotated[Dtype, _flag("Weights and activations; auto takes the checkpoint's.")] = Dtype.auto,
    image_size: Annotated[
        str, _flag("HEIGHTxWIDTH in pixels, or a list of them: each a vision graph; an image takes the nearest shape.")
    ] = "",
    max_tiles: Annotated[int | None, _flag("Tiles that an image is cut into at most.")] = None,
    frames: Annotated[int | None, _flag("Frames of a video at most; adds the graph for videos.")] = None,
    budget_scope: Annotated[
        str,
        _flag("What shares a budget: image and video as a whole, or tile, frame: each has the same; a list of them."),
    ] = "",
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
    json_output: options.Json = False,
    max_batch: Annotated[int, _flag("With --plan: largest batch.")] = 1,
    prompt_tokens: Annotated[int, _flag("With --plan: text of the prompt, template included.")] = 40,
    new_tokens: Annotated[int, _flag("With --plan: tokens of an answer.")] = 64,
    version: options.Version = False,
) -> None:
    """Export a vision-language checkpoint to an ONNX bundle that selects visual tokens by the question."""
    # Every bundle answers with all tokens too: that takes no graph of its own.
    asked = parse_budgets(budget)
    budgets = tuple(each for each in asked if each != ALL)
    visual: dict[str, Any] = {"image_sizes": _parse_sizes(image_size), "max_tiles": max_tiles, "frames": frames}
    visual["scope"] = _parse_scope(budget_scope)
    for name, count in (("max-tiles", max_tiles), ("frames", frames)):
        if count is not None and count < 1:
            raise FlashVLMError(f"--{name} {count}: expected at least 1")
    if plan:
        sizes = (max_seq, max_batch, prompt_tokens, new_tokens)
        _plan(model, budgets, dtype.value, dialect.value, revision, visual, sizes, json_output)
        return
    if out is None:
        raise FlashVLMError(
            "Missing option '--out', the bundle folder to write; or --plan, to see sizes without one "
            "(see flashvlm-export --help)"
        )
    from flashvlm_export.cli.tables import print_report

    with support.bars(quiet) as progress:
        starting = progress.start("starting", 1)
        with _installed():
            from flashvlm_export.exporter import ExportOptions
            from flashvlm_export.exporter import export as run_export
            from flashvlm_export.families.contract import VisualOptions
            from flashvlm_export.selection import SelectionParams
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
        wanted = ExportOptions(
            model=model,
            out=out,
            budgets=budgets,
            default=asked[0],
            method=method,
            params=params,
            query=query.value,
            positions=None if positions is None else positions.value,
            dtype=dtype.value,
            max_seq=max_seq,
            layout=layout.value,
            dialect=dialect.value,
            visual=VisualOptions(**visual),
            revision=revision,
            force=force,
        )
        report = run_export(wanted, progress)
    print_report(report, json_output, quiet)


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:  # also what a version too old or a broken install lead to, hence the reason
        raise FlashVLMError(
            f"{error.name} is not installed or does not import ({error}); install it with: {install('export')}"
        ) from None


def _parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """448x672,672x448 -> (height, width) of each."""
    sizes = tuple(re.fullmatch(r"(\d{1,4})x(\d{1,4})", part.strip()) for part in text.split(",") if part.strip())
    if not all(sizes):
        raise FlashVLMError(f"--image-size {text}: expected HEIGHTxWIDTH in pixels, such as 448x672 or 448x672,672x448")
    return tuple((int(size[1]), int(size[2])) for size in sizes if size)


def _parse_scope(text: str) -> frozenset[str]:
    """tile,frame -> what is not as a whole."""
    words = {word.strip() for word in text.split(",") if word.strip()}
    if odd := words - {"image", "video", "tile", "frame"}:
        raise FlashVLMError(f"--budget-scope {', '.join(sorted(odd))}: expected image, tile, frame or video")
    for whole, unit in (("image", "tile"), ("video", "frame")):
        if {whole, unit} <= words:
            raise FlashVLMError(f"--budget-scope {text}: expected {whole} or {unit}, found both")
    return frozenset(words - {"image", "video"})


def _plan(
    model: str,
    budgets: tuple[int, ...],
    dtype: Any,
    dialect: Any,
    revision: str | None,
    visual: dict[str, Any],
    sizes: tuple[int | None, int, int, int],
    json_output: bool,
) -> None:
    from flashvlm_export.cli.tables import print_plan

    max_seq, max_batch, prompt_tokens, new_tokens = sizes
    for name, size in zip(("max-batch", "prompt-tokens", "new-tokens"), sizes[1:], strict=True):
        if size is not None and size < 1:
            raise FlashVLMError(f"--{name} {size}: expected at least 1")
    with support.waiting("planning"), _installed():
        from flashvlm_export.families.contract import VisualOptions
        from flashvlm_export.plan import PlanOptions
        from flashvlm_export.plan import plan as run_plan

        found = run_plan(
            PlanOptions(
                model, budgets, dtype, max_seq, max_batch, dialect, prompt_tokens, new_tokens, revision,
                VisualOptions(**visual),
            )
        )  # fmt: skip
    print_plan(found, json_output)


def main() -> None:
    support.run(app, "flashvlm-export")


if __name__ == "__main__":
    main()
