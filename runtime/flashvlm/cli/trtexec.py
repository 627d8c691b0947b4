"""``flashvlm-profile --trtexec`` and ``--print-commands``: engines measured by TensorRT's own tool."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from flashvlm.cli import support
from flashvlm.engines import build_command
from flashvlm.errors import FlashVLMError
from flashvlm.files import atomic_folder
from flashvlm.profiling.report import TRTEXEC_FOLDER
from flashvlm.profiling.synthetic import synthetic_prompt
from flashvlm.profiling.trtexec import (
    ANY_GPU,
    Libraries,
    collect,
    command,
    find_engines,
    find_executable,
    jobs,
    script,
    write_values,
)
from flashvlm.profiling.trtexec import run as run_line

if TYPE_CHECKING:
    from flashvlm.bundle import Bundle
    from flashvlm.engines import Engines, Target
    from flashvlm.profiling.measure import Profile, ProfileOptions


def print_commands(
    bundle: Bundle, wanted: ProfileOptions, target: Target | None, libraries: Libraries, out: Path | None
) -> None:
    """The lines for another machine on stdout; with ``out``, the inputs they load into that folder."""
    engines = find_engines(bundle, target)
    target = _target(engines, target, libraries)
    folder = (Path("report") if out is None else out) / TRTEXEC_FOLDER
    measured = jobs(bundle, wanted, synthetic_prompt(bundle, wanted.prompt_tokens)[1], engines)
    if out is not None:
        with atomic_folder(out, replace=True) as partial:
            (partial / TRTEXEC_FOLDER).mkdir()
            for job in measured:
                write_values(job, partial / TRTEXEC_FOLDER)
    for line in script(bundle, measured, engines, target, folder, wanted.runs, libraries):
        typer.echo(line)
    if out is None:
        typer.echo(f"the inputs these lines load from {folder} are written with --out report", err=True)


def measure(
    bundle: Bundle,
    wanted: ProfileOptions,
    target: Target | None,
    libraries: Libraries,
    folder: Path,
    out: Path | None,
) -> Profile:
    """Runs every line with its files under ``folder``; the profile tells them as they are under ``out``."""
    engines = find_engines(bundle, target)
    target = _target(engines, target, libraries)
    if engines is None:
        build = build_command(bundle, target, ANY_GPU)
        raise FlashVLMError(f"{bundle.path} has no engines; build them with: {build}")
    executable = find_executable(target)
    files = folder / TRTEXEC_FOLDER
    prompt = synthetic_prompt(bundle, wanted.prompt_tokens)[1]
    measured = jobs(bundle, wanted, prompt, engines)
    files.mkdir()
    with support.bars() as bars:
        advance = bars.start("profiling", len(measured))
        for job in measured:
            write_values(job, files)
            line = command(bundle, job, engines, target, files, wanted.runs, executable, libraries)
            run_line(line, files / f"{job.name}.log")
            advance(1)
    found = collect(bundle, wanted, measured, files, _backend(engines), len(prompt.input_ids) - 1)
    told = (out or Path("report")) / TRTEXEC_FOLDER
    lines = script(bundle, measured, engines, target, told, wanted.runs, libraries)
    return replace(found, commands=tuple(lines))


def _target(engines: Engines | None, target: Target | None, libraries: Libraries) -> Target:
    chosen: Target = target or ("tensorrt" if engines is None else engines.manifest.target)
    for library in (*libraries.dynamic, *libraries.static):
        if chosen == "tensorrt-rtx":
            raise FlashVLMError("--plugins: TensorRT-RTX runs no plugin layers; leave it out")
        if not library.is_file():
            raise FlashVLMError(f"--plugins {library}: no such file; give the built library, such as a .so")
    return chosen


def _backend(engines: Engines) -> str:
    name = "TensorRT" if engines.manifest.target == "tensorrt" else "TensorRT-RTX"
    return f"{name} {engines.manifest.version}, trtexec"
