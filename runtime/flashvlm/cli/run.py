"""flashvlm-run: ask a bundle about images and videos, once or in a conversation."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashvlm.budget import parse_budget
from flashvlm.cli import options, support
from flashvlm.errors import PromptError

if TYPE_CHECKING:
    from flashvlm.images import ImageSource

app = support.new_app()


@app.command()
def run(
    bundle: options.BundleName,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Image file, or - for stdin; repeat it for several, leave out for text alone.",
        ),
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Video file, or - for stdin; repeat it for several. They follow the images."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The question, or - to read it from stdin; leave out to chat.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Visual tokens to keep, such as 64, or all; if not given, the first of --budget at export."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 picks the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0 for no limit.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that add up to p.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Sample among those at least p times as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens become less likely again.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeat it for several.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="Instructions before the question.")] = None,
    reselect: Annotated[
        bool,
        typer.Option(
            "--reselect/--keep-selection",
            help="In a conversation, select anew for each question, or keep the first selection and the KV cache.",
        ),
    ] = True,
    revision: Annotated[str | None, typer.Option(help="Of a bundle on the Hub: branch, tag or commit.")] = None,
    show: Annotated[
        Path | None,
        typer.Option(help="Write a picture of the kept patches, such as kept.png; of a second image, kept-2.png."),
    ] = None,
    json_output: options.Json = False,
    stats: Annotated[bool, typer.Option("--stats", help="Add a table of tokens and milliseconds a stage.")] = False,
    backend: options.Backend = "auto",
    device: options.Device = 0,
    provider: options.Provider = "auto",
    plugins: options.Plugins = None,
    engine_code: options.EngineCode = False,
    threads: options.Threads = None,
    verify: options.Verify = True,
    version: options.Version = False,
) -> None:
    """Ask a bundle a question about images or videos."""
    from flashvlm.cli.answers import print_answer, print_stats, to_json
    from flashvlm.cli.show import check_show, save_pictures
    from flashvlm.videos import load_video

    sources, clips = image or [], video or []
    _check_stdin(sources, clips, prompt)
    keep = None if budget is None else parse_budget(budget)
    if show is not None:
        check_show(show, [*sources, *clips])
    if prompt is None and (json_output or show is not None):
        raise PromptError("--json and --show need a --prompt")
    images: list[ImageSource] = [support.read_stdin("--image -") if name == "-" else name for name in sources]
    videos = [load_video(support.read_stdin("--video -") if name == "-" else name) for name in clips]
    question = support.read_stdin_text("--prompt -") if prompt == "-" else prompt

    from flashvlm.pipeline import Pipeline

    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "seed": seed,
    }
    with support.waiting("loading"):
        pipeline = Pipeline.from_bundle(
            bundle,
            revision=revision,
            backend=backend,
            device=device,
            provider=provider,
            threads=threads,
            verify=verify,
            plugins=plugins,
            engine_code=engine_code,
        )
    if question is None:
        from flashvlm.cli.chat import chat

        chat(pipeline, images, videos, keep, reselect, system, sampling, stats)
        return
    talk = pipeline.conversation(images or None, video=videos or None, budget=keep, system=system)
    answer = print_answer(lambda: talk.stream(question, **sampling), silent=json_output)
    if show is not None:
        save_pictures(pipeline, [*images, *videos], question, answer, show)
    if json_output:
        typer.echo(json.dumps({**to_json(answer), "backend": asdict(pipeline.backend)}))
    if stats:
        print_stats(pipeline, answer)


def _check_stdin(images: list[str], videos: list[str], prompt: str | None) -> None:
    """One thing is read from stdin at most."""
    reading = ["--image -"] * images.count("-") + ["--video -"] * videos.count("-")
    reading += ["--prompt -"] if prompt == "-" else []
    if reading and prompt is None:
        reading.append("a conversation")
    if len(reading) > 1:
        raise PromptError(f"{reading[0]} and {reading[1]} both read stdin; give one of them another way")


def main() -> None:
    support.run(app, "flashvlm-run")


if __name__ == "__main__":
    main()
