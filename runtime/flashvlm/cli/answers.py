"""An answer on stdout as it comes, as JSON, and as a table of its stages."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from flashvlm.cli import support

if TYPE_CHECKING:
    from flashvlm.answers import Answer, Stream
    from flashvlm.encoder import Selection
    from flashvlm.pipeline import Pipeline


def print_answer(start: Callable[[], Stream], silent: bool = False) -> Answer:
    """Prints the pieces as they come; a spinner on a terminal until the first one. Whatever happens, it is closed."""
    with support.waiting("reading"):
        stream = start()
        first = next(stream, "")
    with stream:
        for piece in itertools.chain([first], stream):
            if not silent:
                typer.echo(support.for_terminal(piece), nl=False)
        if not silent:
            typer.echo("")
    return stream.close()


def to_json(answer: Answer) -> dict[str, Any]:
    """An answer as plain JSON values; milliseconds rounded to microseconds."""
    timings = answer.timings
    return {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "stop_reason": answer.stop_reason,
        "prompt_tokens": answer.prompt_tokens,
        "image_tokens": answer.image_tokens,
        "new_tokens": len(answer.token_ids),
        "images": [_to_json(selection) for selection in answer.selections if selection.grid.clip is None],
        "videos": [
            {**_to_json(selection), "frames": [*clip.indices], "fps": clip.fps}
            for selection in answer.selections
            if (clip := selection.grid.clip) is not None
        ],
        "milliseconds": {
            "preprocess": round(timings.preprocess, 3),
            "vision": round(timings.vision, 3),
            "select": round(timings.select, 3),
            "prefill": round(timings.prefill, 3),
            "decode": [round(step, 3) for step in timings.decode],
        },
    }


def _to_json(selection: Selection) -> dict[str, Any]:
    return {"tokens": selection.count, "kept": selection.kept.tolist(), "is_top": selection.is_top.tolist()}


def print_stats(pipeline: Pipeline, answer: Answer) -> None:
    """Tokens and milliseconds of each stage and each new token, on stderr."""
    from rich.console import Console
    from rich.table import Table

    timings, total = answer.timings, sum(selection.count for selection in answer.selections)
    text_tokens = answer.prompt_tokens - answer.image_tokens
    rows = [("preprocess", "", timings.preprocess)]
    if answer.image_tokens:
        rows.append(("vision", f"{total} image tokens", timings.vision))
        rows.append(("select", f"{answer.image_tokens} kept of {total}", timings.select))
    prompt = f"{answer.prompt_tokens} = {text_tokens} text + {answer.image_tokens} image"
    rows.append(("prefill", prompt, timings.prefill))
    rows += [("decode", f"new token {step}", ms) for step, ms in enumerate(timings.decode, start=2)]
    rows.append(("total", f"{len(answer.token_ids)} new", timings.total))
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("tokens")
    table.add_column("ms", justify="right")
    for stage, tokens, milliseconds in rows:
        table.add_row(stage, tokens, f"{milliseconds:.2f}")
    console = Console(stderr=True, soft_wrap=True)
    console.print(table)
    console.print(str(pipeline.backend), highlight=False, markup=False)
    for reason in pipeline.backend.passed_over:
        console.print(f"engines not used: {reason}", highlight=False, markup=False)
