"""``--show``: the picture of the kept patches, beside the answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from flashvlm.errors import FlashVLMError, ImageError, printable

if TYPE_CHECKING:
    from flashvlm.answers import Answer
    from flashvlm.images import ImageSource
    from flashvlm.pipeline import Pipeline

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def check_show(path: Path, sources: Sequence[str]) -> None:
    """Refuses, before anything is loaded, a place where no picture can be written, or that of the image itself."""
    if len(sources) != 1:
        raise ImageError(f"--show needs one --image, found {len(sources) or 'none'}")
    (source,) = sources
    if path.suffix.lower() not in SUFFIXES:
        raise ImageError(f"--show {path}: expected a name ending in .png, .jpg or .webp")
    try:
        exists = path.parent.is_dir()
        replaces = path.exists() and os.path.exists(source) and path.samefile(source)
    except (OSError, ValueError) as error:  # too long, or with a null byte
        raise ImageError(f"--show {path}: {getattr(error, 'strerror', None) or error}; choose another name") from None
    if not exists:
        raise ImageError(f"--show {path}: the folder {path.parent} does not exist; create it first")
    if replaces:
        raise ImageError(f"--show {path} is the --image itself, which it would replace; choose another name")
    if not os.access(path.parent, os.W_OK):
        raise ImageError(f"--show {path}: no permission to write in {path.parent}; choose another place")


def save_picture(pipeline: Pipeline, source: ImageSource, question: str, answer: Answer, path: Path) -> None:
    """Draws what the answer was given from, and writes it whole or not at all."""
    from flashvlm.files import atomic_file
    from flashvlm.images import load_image
    from flashvlm.kept_picture import draw_kept
    from flashvlm.preprocess import seen_box

    image, selection = load_image(source), pipeline.bundle.manifest.selection
    (shown,) = answer.selections
    if shown.spec.tiled:
        raise FlashVLMError("--show draws images without tiles, found a bundle that cuts them; leave it out")
    picture = draw_kept(
        image,
        shown.kept,
        shown.is_top,
        shown.scores,
        shown.spec.grid,
        seen_box((image.height, image.width), shown.spec.pixels),
        question,
        answer.text,
        method=selection.method,
        score=selection.score,
    )
    try:
        with atomic_file(path) as file:
            picture.save(file, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else path.suffix[1:].upper())
    except OSError as error:
        raise FlashVLMError(f"--show {path} cannot be written: {error.strerror or error}") from None
    typer.echo(f"wrote {printable(path)}", err=True)
