"""What several commands take: one name, one meaning and one help text for each.

A command names these types in its signature; which default it has, it says itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from flashvlm import __version__

BACKENDS = ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx")
PROVIDERS = ("auto", "cpu", "cuda", "tensorrt", "tensorrt-rtx")


def _one_of(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    """For the completion of a shell."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def _print_version(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        typer.echo(f"{context.find_root().info_name} {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
]

# --- what is run, and where ---

BundleFolder = Annotated[Path, typer.Argument(help="Folder that flashvlm-export wrote.")]
BundleName = Annotated[str, typer.Argument(help="Folder that flashvlm-export wrote, or OWNER/NAME on the Hub.")]
Backend = Annotated[
    str,
    typer.Option(
        help="onnxruntime, tensorrt or tensorrt-rtx; auto: engines that fit, else onnxruntime.",
        autocompletion=_one_of(BACKENDS),
    ),
]
Device = Annotated[int, typer.Option(min=0, help="Number of the GPU.")]
Provider = Annotated[
    str,
    typer.Option(
        help="Of onnxruntime: auto, cpu, cuda, tensorrt or tensorrt-rtx.",
        autocompletion=_one_of(PROVIDERS),
    ),
]
Plugins = Annotated[
    Path | None,
    typer.Option(help="Plugin library of the selection, such as build/libflashvlm_plugins.so, to build or run with."),
]
Threads = Annotated[int | None, typer.Option(min=1, max=512, help="Threads; every core if not given.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Check every file's SHA-256 first.")]
EngineCode = Annotated[bool, typer.Option("--engine-code", help="Take engines that carry a TensorRT runtime as code.")]

# --- what comes out ---

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")]
