"""``--show``: the picture of the kept patches, beside the answer. One for each image and video."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from flashvlm.errors import FlashVLMError, ImageError, printable

if TYPE_CHECKING:
    import PIL.Image

    from flashvlm.answers import Answer
    from flashvlm.images import ImageSource
    from flashvlm.pipeline import Pipeline
    from flashvlm.videos import Video

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def places(path: Path, count: int) -> list[Path]:
    """Where the pictures of ``count`` images and videos go: kept.png, kept-2.png, kept-3.png."""
    return [path, *(path.with_stem(f"{path.stem}-{number}") for number in range(2, count + 1))]


def check_show(path: Path, sources: Sequence[str]) -> None:
    """Refuses, before anything is loaded, a place where no picture can be written, or that of an input itself."""
    if not sources:
        raise ImageError("--show draws an image or video, found none; give one")
    if path.suffix.lower() not in SUFFIXES:
        raise ImageError(f"--show {path}: expected a name ending in .png, .jpg or .webp")
    try:
        exists = path.parent.is_dir()
        found = [place for place in places(path, len(sources)) if place.exists()]
        known = [source for source in sources if os.path.exists(source)]
        replaced = next((place for place in found for source in known if place.samefile(source)), None)
    except (OSError, ValueError) as error:  # too long, or with a null byte
        raise ImageError(f"--show {path}: {getattr(error, 'strerror', None) or error}; choose another name") from None
    if not exists:
        raise ImageError(f"--show {path}: the folder {path.parent} does not exist; create it first")
    if replaced is not None:
        raise ImageError(f"--show {replaced} is an input itself, which it would replace; choose another name")
    if not os.access(path.parent, os.W_OK):
        raise ImageError(f"--show {path}: no permission to write in {path.parent}; choose another place")


def save_pictures(
    pipeline: Pipeline, visuals: Sequence[ImageSource | Video], question: str, answer: Answer, path: Path
) -> None:
    """Draws each image and video that the answer was given from, and writes each picture whole or not at all."""
    from flashvlm.contact_sheet import draw_sheet
    from flashvlm.images import load_image
    from flashvlm.kept_picture import draw_kept
    from flashvlm.tilings import Frames
    from flashvlm.videos import Video

    method, score = pipeline.bundle.manifest.selection.method, pipeline.bundle.manifest.selection.score
    names, files = _names([isinstance(visual, Video) for visual in visuals]), places(path, len(visuals))
    for visual, shown, name, file in zip(visuals, answer.selections, names, files, strict=True):
        if isinstance(visual, Video):
            assert isinstance(shown.spec.pixels, Frames)
            _, frames, _ = visual.shown(shown.spec.pixels)
            picture = draw_sheet(frames, shown, question, answer.text, method, name)
        else:
            picture = draw_kept(load_image(visual), shown, question, answer.text, method, score, name)
        _save(picture, file)


def _names(videos: Sequence[bool]) -> list[str]:
    """What each is called in a heading: nothing where it is the only one, else "Image 2 of 3", "Video"."""
    if len(videos) == 1:
        return [""]
    names = []
    for number, video in enumerate(videos):
        word, before, count = "Video" if video else "Image", videos[: number + 1].count(video), videos.count(video)
        names.append(f"{word} {before} of {count}" if count > 1 else word)
    return names


def _save(picture: PIL.Image.Image, path: Path) -> None:
    from flashvlm.files import atomic_file

    try:
        with atomic_file(path) as file:
            picture.save(file, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else path.suffix[1:].upper())
    except OSError as error:
        raise FlashVLMError(f"--show {path} cannot be written: {error.strerror or error}") from None
    typer.echo(f"wrote {printable(path)}", err=True)
