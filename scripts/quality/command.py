"""scripts/benchmark quality."""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from quality.measures import Scored
    from quality.report import Conditions, Scores
    from quality.runs import Sitting
    from quality.variants import Variant

OF_METHODS, OF_OTHERS = (192, 128, 64, 32, 16, 8), (32, 16)  # budgets beside all tokens
QUESTIONS = {"test": 2100, "check": 700}
Plan: TypeAlias = "list[tuple[Variant, list[int]]]"  # and its budgets


def quality(
    questions: Annotated[
        int | None, typer.Option(help="Held-out questions, seven a scene; if not given, 2,100 of test, 700 of check.")
    ] = None,
    variants: Annotated[
        str, typer.Option(help="methods, ablations, all, or names: eta=0.25,trim,flashvlm:eta=0.75:query=prompt.")
    ] = "methods",
    budgets: Annotated[
        str | None, typer.Option(help="Tokens to keep; if not given, 192 to 8 for methods, 32 and 16 for others.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model that answers: demo, or a LLaVA-1.5 checkpoint folder.")] = "demo",
    work: Annotated[Path, typer.Option(help="For graphs and answers; a run that was cut short goes on.")] = Path(
        "demo-out/quality"
    ),
    split: Annotated[
        str | None, typer.Option(help="test, to report; check, to choose by; if not given, test for methods only.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; every core if not given.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of timing the selection graphs; 0 for none.")] = 30,
    write: Annotated[
        Path | None, typer.Option(help="Folder whose quality-tables.md and quality.png are renewed: docs.")
    ] = None,
) -> None:
    """Accuracy of every selection method by budget and kind of question, through the exported graphs."""
    from flashvlm.errors import FlashVLMError
    from quality.variants import parse

    try:
        wanted = parse(variants)
        sizes = None if budgets is None else [int(each) for each in budgets.split(",")]
    except (ValueError, FlashVLMError) as error:
        raise typer.BadParameter(str(error)) from None
    if split not in (None, *QUESTIONS) or (questions is not None and questions < 1) or (sizes and min(sizes) < 1):
        raise typer.BadParameter("expected --split test or check, --questions and --budgets of at least 1")
    if write and not write.is_dir():
        raise typer.BadParameter(f"--write {write}: there is no such folder; expected docs")
    try:
        for of_split, plan in _plans(wanted, sizes, split).items():
            _quality(plan, questions or QUESTIONS[of_split], model, work, of_split, threads, rounds, write)
    except FlashVLMError as error:
        raise typer.BadParameter(str(error)) from None


def _plans(wanted: list[Variant], sizes: list[int] | None, split: str | None) -> dict[str, Plan]:
    """By split: what is offered is reported on questions that nothing was chosen by."""
    from quality.variants import METHODS

    found: dict[str, list[Variant]] = {}
    for variant in wanted:
        found.setdefault(split or ("test" if variant in METHODS else "check"), []).append(variant)
    return {name: _plan(variants, sizes) for name, variants in found.items()}


def _plan(wanted: list[Variant], sizes: list[int] | None) -> Plan:
    """Every variant with its budgets, the one they are compared with included. All tokens are run in any case."""
    from quality.variants import EVERYTHING, METHODS, REFERENCE

    compared = [variant for variant in METHODS if variant.name == REFERENCE and variant not in wanted]
    whole_group = all(method in wanted for method in METHODS)
    return [
        (variant, [*(sizes or (OF_METHODS if whole_group and variant in METHODS else OF_OTHERS))])
        for variant in (*wanted, *compared)
        if variant != EVERYTHING
    ]


def _quality(
    plan: Plan,
    questions: int,
    model: str,
    work: Path,
    split: str,
    threads: int | None,
    rounds: int,
    write: Path | None,
) -> None:
    from quality import report
    from quality.runs import Sitting

    console = Console(width=150)
    columns = (TextColumn("{task.description:32}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        task = bars.add_task("questions, model", total=None)
        sitting = Sitting(model, work, questions, split, threads)
        plan = [(variant, [size for size in budgets if size < sitting.all_tokens]) for variant, budgets in plan]
        plan = [(variant, budgets) for variant, budgets in plan if budgets]
        bars.update(task, total=(sum(len(budgets) for _, budgets in plan) + 1) * len(sitting.items))
        everything, scored = _score(
            sitting, plan, rounds, lambda doing, done: bars.update(task, description=doing, advance=done)
        )
    conditions = report.Conditions(
        command=shlex.join(["scripts/benchmark", *_given(sys.argv[1:])]),
        model=Path(model).name,
        questions=len(sitting.items),
        scenes=len({*sitting.task.groups}),
        split=split,
        backend=f"ONNX Runtime {_version()}, {threads or os.cpu_count()} threads, float32",
    )
    scores = report.Scores(everything, scored)
    report.write_json(work / f"{split}.json", report.to_json(conditions, everything, scored))
    whole = f"all {everything.run.tokens} tokens: {everything.by['all'].accuracy:.1%}"
    console.print(f"{whole}; {conditions}", highlight=False)
    _print(console, scores, list(dict.fromkeys(variant.name for variant, _ in plan)))
    if write is not None:
        _write(write, scores, conditions)


def _score(sitting: Sitting, plan: Plan, rounds: int, step: Callable[[str, int], None]) -> tuple[Scored, list[Scored]]:
    """All tokens, and every run of the plan."""
    from quality.measures import score
    from quality.variants import REFERENCE

    everything = sitting.everything(step)
    runs = [run for variant, budgets in plan for run in sitting.runs(variant, budgets, step)]
    step("milliseconds of selection", 0)
    milliseconds = sitting.select_milliseconds(runs, rounds) if rounds else {}
    step("intervals", 0)
    whole, *scored = score([everything, *runs], sitting.task, sitting.items, everything, REFERENCE, milliseconds)
    return whole, scored


def _write(folder: Path, scores: Scores, conditions: Conditions) -> None:
    """The blocks of the document whose variants were all run."""
    from quality import plot, report
    from quality.variants import ALL_TOKENS, METHODS, known_names

    blocks, methods = {}, [variant.name for variant in METHODS]
    if scores.has(methods):
        blocks["methods"] = report.methods_block(scores, conditions)
        picture = io.BytesIO()
        plot.draw(scores, methods).save(picture, "PNG", optimize=True)
        report.replace(folder / report.PICTURE, picture.getvalue())
    if scores.has(known_names() - {ALL_TOKENS, *methods}):
        blocks["ablations"] = report.ablations_block(scores, conditions)
    report.write_blocks(folder / report.DOCUMENT, blocks)


def _print(console: Console, scores: Scores, names: list[str]) -> None:
    from quality.report import interval
    from quality.variants import REFERENCE

    for budget in scores.budgets(names):
        table = Table(title=f"budget {budget}", title_justify="left", box=None, pad_edge=False)
        columns = ("variant", "tokens", "accuracy", f"against {REFERENCE}", "patches kept", "select ms")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for name in names:
            found = scores.get(name, budget)
            if found is None:
                continue
            kept, time = found.by["all"].kept, found.select_ms
            against = found.against.get("all")
            table.add_row(
                name,
                str(found.run.tokens),
                f"{found.by['all'].accuracy:.1%}",
                "" if against is None else interval(against).strip("*"),
                "" if kept is None else f"{kept:.1%}",
                "" if time is None else f"{time:.2f}",
            )
        console.print(table)


def _given(arguments: list[str]) -> list[str]:
    """The command line without the option that says only where files lie."""
    pairs = zip(arguments, ["", *arguments], strict=False)
    return [this for this, before in pairs if "--work" not in (this, before) and not this.startswith("--work=")]


def _version() -> str:
    import onnxruntime

    return onnxruntime.__version__
