"""flashvlm-profile: where the milliseconds and megabytes of an answer go."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from flashvlm.cli import support
from flashvlm.errors import FlashVLMError, SelectionError, printable

if TYPE_CHECKING:
    from flashvlm.bundle import Bundle
    from flashvlm.engines import Engines, Target
    from flashvlm.profiling.measure import Budget, Profile, ProfileOptions

app = support.new_app()

BACKENDS = ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx")
LINE = 200  # columns of output that goes to a file or a pipe


@app.command()
def profile(
    bundle: Annotated[Path, typer.Argument(help="Folder that flashvlm-export wrote.")],
    budgets: Annotated[str | None, typer.Option(help="Such as 32,64,all; every budget if not given.")] = None,
    backend: Annotated[
        str, typer.Option(help="onnxruntime, tensorrt or tensorrt-rtx; auto: engines that fit, else onnxruntime.")
    ] = "auto",
    device: Annotated[int, typer.Option(min=0, help="Number of the GPU.")] = 0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Text of the prompt, template included.")] = 40,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Answers measured at each budget.")] = 20,
    warm_up: Annotated[int, typer.Option(min=0, help="Answers before those, not measured.")] = 2,
    target_ms: Annotated[float | None, typer.Option(help="Recommend a budget for this time to first token.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for profile.json and profile.png.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier report in --out.")] = False,
    trtexec: Annotated[bool, typer.Option("--trtexec", help="Measure compiled engines, and their layers.")] = False,
    print_commands: Annotated[bool, typer.Option("--print-commands", help="Only print the trtexec lines.")] = False,
    plugin: Annotated[list[Path] | None, typer.Option(help="Plugin library for trtexec --dynamicPlugins.")] = None,
    static_plugin: Annotated[list[Path] | None, typer.Option(help="The same for --staticPlugins.")] = None,
    provider: Annotated[str, typer.Option(help="Of onnxruntime: auto, cpu, cuda, tensorrt or tensorrt-rtx.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, max=512, help="Threads; every core if not given.")] = None,
    engine_code: Annotated[
        bool, typer.Option("--engine-code", help="Take engines that carry a TensorRT runtime as code.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check every file's SHA-256 first.")] = True,
) -> None:
    """Measure vision, selection, prefill and decoding at each budget of a bundle."""
    from flashvlm.bundle import Bundle
    from flashvlm.profiling.measure import ProfileOptions, check_options
    from flashvlm.profiling.report import check_out

    _check(backend, target_ms, trtexec or print_commands)
    with support.waiting("checking"):
        opened = Bundle(bundle, verify=verify)
    options = ProfileOptions(_budgets(budgets, opened), prompt_tokens, new_tokens, runs, warm_up)
    check_options(opened.manifest, options)
    if out is not None:
        check_out(out, force)
        if (trtexec or print_commands) and (found := set(str(out)) & set(",:'")):
            raise FlashVLMError(f"--out {out}: trtexec splits lists of files at {min(found)!r}; choose another name")
    plugins = {"plugins": plugin or [], "static_plugins": static_plugin or []}
    target = None if backend in ("auto", "onnxruntime") else cast("Target", backend)
    if print_commands:
        _print_commands(opened, options, target, plugins, out)
        return
    with _folder(out) as folder:
        if trtexec:
            measured = _drive_trtexec(opened, options, target, plugins, folder, out)
        else:
            place = {"backend": backend, "device": device, "provider": provider, "threads": threads}
            measured = _measure(opened, options, place | {"verify": verify, "engine_code": engine_code})
        _report(measured, target_ms, None if out is None else folder)
    if out is not None:
        typer.echo(f"wrote {printable(out)}", err=True)


def _check(backend: str, target_ms: float | None, trtexec: bool) -> None:
    if backend not in BACKENDS:
        raise FlashVLMError(f"--backend {backend!r}: expected {', '.join(BACKENDS)}")
    if backend == "onnxruntime" and trtexec:
        raise FlashVLMError("--backend onnxruntime: --trtexec and --print-commands are for tensorrt and tensorrt-rtx")
    if target_ms is not None and not 0 < target_ms < float("inf"):
        raise FlashVLMError(f"--target-ms {target_ms}: expected milliseconds above 0")


def _budgets(text: str | None, bundle: Bundle) -> tuple[Budget, ...]:
    """``32,64,all`` -> its parts, each once, from few tokens to all."""
    if text is None:
        return (*bundle.manifest.selection.budgets, "all")
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part != "all" and not (part.isascii() and part.isdigit()):
            raise SelectionError(f"--budgets {text!r}: expected whole numbers of tokens or all, between commas")
    numbers = sorted({int(part) for part in parts if part != "all"})
    return (*numbers, "all") if "all" in parts else tuple(numbers)


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where files go until they are complete: to become ``out``, or to be thrown away."""
    from flashvlm.files import atomic_folder

    if out is None:
        with tempfile.TemporaryDirectory(prefix="flashvlm-profile-") as folder:
            yield Path(folder)
    else:
        with atomic_folder(out, replace=True) as partial:
            yield partial


def _measure(bundle: Bundle, options: ProfileOptions, place: dict[str, Any]) -> Profile:
    from flashvlm.pipeline import Pipeline
    from flashvlm.profiling.measure import measure

    with support.waiting("loading"):
        pipeline = Pipeline.from_bundle(bundle, **place)
    with support.bars() as bars:
        advance = bars.start("profiling", (options.runs + options.warm_up) * len(options.budgets))
        return measure(pipeline, str(pipeline.backend), options, advance)


def _print_commands(
    bundle: Bundle, options: ProfileOptions, target: Target | None, plugins: dict[str, list[Path]], out: Path | None
) -> None:
    from flashvlm.files import atomic_folder
    from flashvlm.profiling.measure import synthetic_prompt
    from flashvlm.profiling.report import TRTEXEC_FOLDER
    from flashvlm.profiling.trtexec import find_engines, jobs, script, write_values

    engines = find_engines(bundle, target)
    target = _target(engines, target, plugins)
    folder = (Path("report") if out is None else out) / TRTEXEC_FOLDER
    measured = jobs(bundle, options, synthetic_prompt(bundle, options.prompt_tokens)[1], engines)
    if out is not None:
        with atomic_folder(out, replace=True) as partial:
            (partial / TRTEXEC_FOLDER).mkdir()
            for job in measured:
                write_values(job, partial / TRTEXEC_FOLDER)
    for line in script(bundle, measured, engines, target, folder, options.runs, **plugins):
        typer.echo(line)
    if out is None:
        typer.echo(f"the inputs these lines load from {folder} are written with --out report", err=True)


def _drive_trtexec(
    bundle: Bundle,
    options: ProfileOptions,
    target: Target | None,
    plugins: dict[str, list[Path]],
    folder: Path,
    out: Path | None,
) -> Profile:
    """Runs every line with its files under ``folder``; the profile tells them as they are under ``out``."""
    from flashvlm.engines import build_command
    from flashvlm.profiling.measure import synthetic_prompt
    from flashvlm.profiling.report import TRTEXEC_FOLDER
    from flashvlm.profiling.trtexec import (
        ANY_GPU,
        collect,
        command,
        find_engines,
        find_executable,
        jobs,
        script,
        write_values,
    )
    from flashvlm.profiling.trtexec import run as run_line

    engines = find_engines(bundle, target)
    target = _target(engines, target, plugins)
    if engines is None:
        build = build_command(bundle, target, ANY_GPU)
        raise FlashVLMError(f"{bundle.path} has no engines; build them with: {build}")
    executable = find_executable(target)
    files = folder / TRTEXEC_FOLDER
    prompt = synthetic_prompt(bundle, options.prompt_tokens)[1]
    measured = jobs(bundle, options, prompt, engines)
    files.mkdir()
    with support.bars() as bars:
        advance = bars.start("profiling", len(measured))
        for job in measured:
            write_values(job, files)
            line = command(bundle, job, engines, target, files, options.runs, executable, **plugins)
            run_line(line, files / f"{job.name}.log")
            advance(1)
    found = collect(bundle, options, measured, files, _backend(engines), len(prompt.input_ids) - 1)
    told = (out or Path("report")) / TRTEXEC_FOLDER
    lines = script(bundle, measured, engines, target, told, options.runs, **plugins)
    return replace(found, commands=tuple(lines))


def _target(engines: Engines | None, target: Target | None, plugins: dict[str, list[Path]]) -> Target:
    chosen: Target = target or ("tensorrt" if engines is None else engines.manifest.target)
    for library in (*plugins["plugins"], *plugins["static_plugins"]):
        if chosen == "tensorrt-rtx":
            raise FlashVLMError("--plugin: TensorRT-RTX runs no plugin layers; leave it out")
        if not library.is_file():
            raise FlashVLMError(f"--plugin {library}: no such file; give the built library, such as a .so")
    return chosen


def _backend(engines: Engines) -> str:
    name = "TensorRT" if engines.manifest.target == "tensorrt" else "TensorRT-RTX"
    return f"{name} {engines.manifest.version}, trtexec"


def _report(measured: Profile, target_ms: float | None, folder: Path | None) -> None:
    from rich.console import Console

    from flashvlm.profiling.measure import recommend
    from flashvlm.profiling.report import print_table, write

    recommendation = None if target_ms is None else recommend(measured, target_ms)
    if folder is not None:
        write(measured, recommendation, folder)
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console = Console(soft_wrap=True, width=LINE)
    print_table(measured, recommendation, console)


def main() -> None:
    support.run(app, "flashvlm-profile")


if __name__ == "__main__":
    main()
