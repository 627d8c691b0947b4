"""flashvlm-profile: where the milliseconds and megabytes of an answer go."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from flashvlm.budget import ALL, by_size, parse_budgets
from flashvlm.cli import options, support
from flashvlm.errors import FlashVLMError, printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from flashvlm.bundle import Bundle
    from flashvlm.engines import Target
    from flashvlm.profiling.measure import Profile, ProfileOptions
    from flashvlm.profiling.trtexec import Libraries

app = support.new_app()

LINE = 200  # columns of output that goes to a file or a pipe


@app.command()
def profile(
    bundle: options.BundleFolder,
    budget: Annotated[
        str | None, typer.Option(help="Budgets to measure, such as 32,64,all; every one of the bundle if not given.")
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Image to measure with, or - for stdin; synthetic ones if not given."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Text of the prompt, template included.")] = 40,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Answers measured at each budget.")] = 20,
    warm_up: Annotated[int, typer.Option(min=0, help="Answers before those, not measured.")] = 2,
    target_ms: Annotated[float | None, typer.Option(help="Recommend a budget for this time to first token.")] = None,
    json_output: options.Json = False,
    out: Annotated[Path | None, typer.Option(help="Folder for profile.json and profile.png.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier report in --out.")] = False,
    trtexec: Annotated[bool, typer.Option("--trtexec", help="Measure compiled engines, and their layers.")] = False,
    print_commands: Annotated[bool, typer.Option("--print-commands", help="Only print the trtexec lines.")] = False,
    backend: options.Backend = "auto",
    device: options.Device = 0,
    provider: options.Provider = "auto",
    plugins: Annotated[
        list[Path] | None,
        typer.Option(help="Plugin library that engines were built with; of trtexec, any --dynamicPlugins."),
    ] = None,
    static_plugins: Annotated[list[Path] | None, typer.Option(help="Of trtexec, any --staticPlugins.")] = None,
    engine_code: options.EngineCode = False,
    threads: options.Threads = None,
    verify: options.Verify = True,
    version: options.Version = False,
) -> None:
    """Measure vision, selection, prefill and decoding at each budget of a bundle."""
    from flashvlm.bundle import Bundle
    from flashvlm.images import load_image
    from flashvlm.profiling.measure import ProfileOptions, check_options
    from flashvlm.profiling.report import check_out
    from flashvlm.profiling.synthetic import PHOTO
    from flashvlm.profiling.trtexec import Libraries

    by_trtexec = trtexec or print_commands
    libraries = Libraries(tuple(plugins or ()), tuple(static_plugins or ()))
    _check(backend, target_ms, by_trtexec, image, libraries)
    asked = None if budget is None else by_size(parse_budgets(budget))
    if out is not None:
        check_out(out, force)
        if by_trtexec and (found := set(str(out)) & set(",:'")):
            raise FlashVLMError(f"--out {out}: trtexec splits lists of files at {min(found)!r}; choose another name")
    picture = None if image is None else load_image(support.read_stdin("--image -") if image == "-" else image)
    with support.waiting("checking"):
        opened = Bundle(bundle, verify=verify)
    wanted = ProfileOptions(
        asked or by_size((*opened.manifest.selection.budgets, ALL)),
        prompt_tokens,
        new_tokens,
        runs,
        warm_up,
        image,
        PHOTO if picture is None else picture.size,
    )
    check_options(opened.manifest, wanted)
    target = None if backend in ("auto", "onnxruntime") else cast("Target", backend)
    if by_trtexec:
        from flashvlm.cli import trtexec as driver
    if print_commands:
        driver.print_commands(opened, wanted, target, libraries, out)
        return
    with _folder(out) as folder:
        if trtexec:
            measured = driver.measure(opened, wanted, target, libraries, folder, out)
        else:
            place: dict[str, Any] = {"backend": backend, "device": device, "provider": provider, "threads": threads}
            place |= {"verify": verify, "engine_code": engine_code, "plugins": next(iter(libraries.dynamic), None)}
            measured = _measure(opened, wanted, picture, place)
        _report(measured, target_ms, json_output, None if out is None else folder)
    if out is not None:
        typer.echo(f"wrote {printable(out)}", err=True)


def _check(backend: str, target_ms: float | None, by_trtexec: bool, image: str | None, libraries: Libraries) -> None:
    if backend not in options.BACKENDS:
        raise FlashVLMError(f"--backend {backend!r}: expected {', '.join(options.BACKENDS)}")
    if backend == "onnxruntime" and by_trtexec:
        raise FlashVLMError("--backend onnxruntime: --trtexec and --print-commands are for tensorrt and tensorrt-rtx")
    if target_ms is not None and not 0 < target_ms < float("inf"):
        raise FlashVLMError(f"--target-ms {target_ms}: expected milliseconds above 0")
    if image is not None and by_trtexec:
        raise FlashVLMError("--image: trtexec makes pixels of its own; leave it out, or measure without --trtexec")
    if not by_trtexec and (libraries.static or len(libraries.dynamic) > 1):
        raise FlashVLMError("--static-plugins and a second --plugins are for trtexec; add --trtexec")


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


def _measure(bundle: Bundle, wanted: ProfileOptions, image: Image | None, place: dict[str, Any]) -> Profile:
    from flashvlm.pipeline import Pipeline
    from flashvlm.profiling.measure import measure

    with support.waiting("loading"):
        pipeline = Pipeline.from_bundle(bundle, **place)
    with support.bars() as bars:
        advance = bars.start("profiling", (wanted.runs + wanted.warm_up) * len(wanted.budgets))
        return measure(pipeline, str(pipeline.backend), wanted, advance, image)


def _report(measured: Profile, target_ms: float | None, json_output: bool, folder: Path | None) -> None:
    from rich.console import Console

    from flashvlm.profiling.measure import recommend
    from flashvlm.profiling.report import write
    from flashvlm.profiling.table import print_table, to_json

    recommendation = None if target_ms is None else recommend(measured, target_ms)
    missing = None if folder is None else write(measured, recommendation, folder)
    if json_output:
        typer.echo(json.dumps(to_json(measured, recommendation), indent=1))
    else:
        console = Console(soft_wrap=True)
        if not console.is_terminal:
            console = Console(soft_wrap=True, width=LINE)
        print_table(measured, recommendation, console)
    if missing:
        typer.echo(missing, err=True)


def main() -> None:
    support.run(app, "flashvlm-profile")


if __name__ == "__main__":
    main()
