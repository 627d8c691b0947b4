"""flashvlm-run: ask a bundle about an image, once or in a conversation."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flashvlm.cli import support
from flashvlm.errors import FlashVLMError, ImageError, PromptError, SelectionError, printable

if TYPE_CHECKING:
    from flashvlm.pipeline import Answer, Pipeline, Stream

app = support.new_app()


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="Folder that flashvlm-export wrote.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; leave out for text alone.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The question; leave out to chat.")] = None,
    budget: Annotated[str | None, typer.Option(help="Visual tokens to keep, or all; the smallest exported.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 picks the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0 for no limit.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that add up to p.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    show: Annotated[Path | None, typer.Option(help="Write a picture of the kept patches, such as kept.png.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Add a table of tokens and milliseconds a stage.")] = False,
    backend: Annotated[
        str, typer.Option(help="onnxruntime, tensorrt or tensorrt-rtx; auto: engines that fit, else onnxruntime.")
    ] = "auto",
    device: Annotated[int, typer.Option(min=0, help="Number of the GPU.")] = 0,
    provider: Annotated[str, typer.Option(help="Of onnxruntime: auto, cpu, cuda, tensorrt or tensorrt-rtx.")] = "auto",
    plugins: Annotated[Path | None, typer.Option(help="Plugin library, for engines that were built with one.")] = None,
    engine_code: Annotated[
        bool, typer.Option("--engine-code", help="Take engines that carry a TensorRT runtime as code.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, max=512, help="Threads; every core if not given.")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check every file's SHA-256 first.")] = True,
) -> None:
    """Ask a bundle a question about an image."""
    from flashvlm.pipeline import Pipeline

    images = image or []
    if len(images) > 1:
        raise PromptError(f"expected one --image, found {len(images)}; several images in one prompt are not supported")
    source = images[0] if images else None
    keep = _budget(budget)
    if show is not None:
        _check_show(show, source)
    if prompt is None and (json_output or show is not None):
        raise PromptError("--json and --show need a --prompt")
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    place: dict[str, Any] = {
        "backend": backend,
        "device": device,
        "provider": provider,
        "threads": threads,
        "plugins": plugins,
        "engine_code": engine_code,
    }
    with support.waiting("loading"):
        pipeline = Pipeline.from_bundle(bundle, verify=verify, **place)
    if prompt is None:
        _chat(pipeline, source, keep, options)
        return
    answer = _drain(lambda: pipeline.stream(source, prompt, budget=keep, **options), silent=json_output)
    if show is not None and source is not None:
        _save_picture(pipeline, source, prompt, answer, show)
    if json_output:
        typer.echo(json.dumps({**to_json(answer), "backend": asdict(pipeline.backend)}))
    if stats:
        _print_stats(pipeline, answer)


def _budget(text: str | None) -> int | Literal["all"] | None:
    if text is None:
        return None
    if text == "all":
        return "all"
    try:
        return int(text)
    except ValueError:
        raise SelectionError(f"--budget {text!r}: expected a whole number of tokens, or all") from None


def _drain(start: Callable[[], Stream], silent: bool) -> Answer:
    """Prints the pieces as they come; a spinner on a terminal until the first one."""
    with support.waiting("reading"):
        stream = start()
        first = next(stream, "")
    for piece in itertools.chain([first], stream):
        if not silent:
            typer.echo(support.for_terminal(piece), nl=False)
    if not silent:
        typer.echo("")
    assert stream.answer is not None
    return stream.answer


def _chat(
    pipeline: Pipeline, source: Path | None, budget: int | Literal["all"] | None, options: dict[str, Any]
) -> None:
    """Reads questions until the end of input; each selects its own visual tokens, vision runs once."""
    conversation = pipeline.conversation(source, budget=budget)
    typer.echo("Ask; an empty line or Ctrl-D ends.", err=True)
    while True:
        typer.echo("> ", nl=False, err=True)
        try:
            question = input()
        except EOFError:
            typer.echo("", err=True)
            return
        if not question.strip():
            return
        try:
            _drain(partial(conversation.stream, question, **options), silent=False)
        except PromptError as error:  # the conversation goes on without this question
            typer.echo(f"error: {error}", err=True)


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
        "kept": None if answer.kept is None else answer.kept.tolist(),
        "is_top": None if answer.is_top is None else answer.is_top.tolist(),
        "milliseconds": {
            "preprocess": round(timings.preprocess, 3),
            "vision": round(timings.vision, 3),
            "select": round(timings.select, 3),
            "prefill": round(timings.prefill, 3),
            "decode": [round(step, 3) for step in timings.decode],
        },
    }


def _check_show(path: Path, source: Path | None) -> None:
    if source is None:
        raise ImageError("--show needs an --image")
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ImageError(f"--show {path}: expected a name ending in .png, .jpg or .webp")
    try:
        exists = path.parent.is_dir()
        replaces = path.exists() and source.exists() and path.samefile(source)
    except (OSError, ValueError) as error:  # too long, or with a null byte
        raise ImageError(f"--show {path}: {getattr(error, 'strerror', None) or error}; choose another name") from None
    if not exists:
        raise ImageError(f"--show {path}: the folder {path.parent} does not exist; create it first")
    if replaces:
        raise ImageError(f"--show {path} is the --image itself, which it would replace; choose another name")
    if not os.access(path.parent, os.W_OK):
        raise ImageError(f"--show {path}: no permission to write in {path.parent}; choose another place")


def _save_picture(pipeline: Pipeline, source: Path, prompt: str, answer: Answer, path: Path) -> None:
    from flashvlm.files import atomic_file
    from flashvlm.images import crop_box, load_image
    from flashvlm.kept_picture import draw_kept

    manifest = pipeline.bundle.manifest
    image = load_image(source)
    assert answer.kept is not None
    assert answer.is_top is not None
    assert answer.scores is not None
    box = crop_box(image.size, manifest.image)
    grid = manifest.model.image_grid
    picture = draw_kept(image, answer.kept, answer.is_top, answer.scores, grid, box, prompt, answer.text)
    try:
        with atomic_file(path) as file:
            picture.save(file, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else path.suffix[1:].upper())
    except OSError as error:
        raise FlashVLMError(f"--show {path} cannot be written: {error.strerror or error}") from None
    typer.echo(f"wrote {printable(path)}", err=True)


def _print_stats(pipeline: Pipeline, answer: Answer) -> None:
    from rich.console import Console
    from rich.table import Table

    timings, model = answer.timings, pipeline.bundle.manifest.model
    new = len(answer.token_ids)
    text_tokens = answer.prompt_tokens - answer.image_tokens
    rows = [
        ("preprocess", "", timings.preprocess),
        ("vision", f"{model.num_image_tokens} image tokens", timings.vision),
        ("select", f"{answer.image_tokens} kept of {model.num_image_tokens}", timings.select),
        (
            "prefill",
            f"{answer.prompt_tokens} = {text_tokens} text + {answer.image_tokens} image",
            timings.prefill,
        ),
    ]
    table = Table(box=None, pad_edge=False)
    for column, justify in (("stage", "left"), ("tokens", "left"), ("ms", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for stage, tokens, milliseconds in rows:
        table.add_row(stage, tokens, f"{milliseconds:.2f}")
    for step, milliseconds in enumerate(timings.decode, start=2):
        table.add_row("decode", f"new token {step}", f"{milliseconds:.2f}")
    table.add_row("total", f"{new} new", f"{timings.total:.2f}")
    console = Console(stderr=True, soft_wrap=True)
    console.print(table)
    console.print(str(pipeline.backend), highlight=False, markup=False)
    for reason in pipeline.backend.passed_over:
        console.print(f"engines not used: {reason}", highlight=False, markup=False)


def main() -> None:
    support.run(app, "flashvlm-run")


if __name__ == "__main__":
    main()
