"""Settings of transformers' image processors in the bundle's own terms."""

from __future__ import annotations

from typing import Any

from flashvlm.errors import CheckpointError
from flashvlm.tilings import Single

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling


def normalisation(processor: Any) -> dict[str, Any]:
    """resample, rescale, mean and std, as ``flashvlm.preprocess`` takes them.

    Raises:
        CheckpointError: a step is switched off, or its setting has no counterpart.
    """
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not getattr(processor, step, False):
            raise CheckpointError(f"preprocessor_config.json: {step} is off; expected resize, rescale and normalize")
    if processor.resample not in RESAMPLE:
        raise CheckpointError(
            f"preprocessor_config.json: resample is {processor.resample!r}; expected one of {RESAMPLE}"
        )
    return {
        "resample": RESAMPLE[int(processor.resample)],
        "rescale": processor.rescale_factor,
        "mean": tuple(processor.image_mean),
        "std": tuple(processor.image_std),
    }


def square(size: Any, name: str) -> int:
    """The edge in pixels of ``{"height": s, "width": s}``. Raises CheckpointError."""
    found = dict(size)
    if found.get("height") is None or found.get("height") != found.get("width"):
        raise CheckpointError(f"preprocessor_config.json: {name} is {found}; expected a square of height and width")
    return int(found["height"])


def cropped(processor: Any, side: int) -> Single:
    """Resized by the shorter edge and cropped at the centre, to a tower of ``side`` pixels. Raises CheckpointError."""
    size, crop = dict(processor.size), dict(processor.crop_size)
    if not processor.do_center_crop or "shortest_edge" not in size:
        raise CheckpointError("preprocessor_config.json: expected resize by shortest edge and center crop")
    if (crop["height"], crop["width"]) != (side, side):
        raise CheckpointError(f"preprocessor_config.json: crop_size is {crop}; the vision tower takes {side} x {side}")
    return Single(
        resize="shortest_edge",
        size=(size["shortest_edge"], size["shortest_edge"]),
        crop=(side, side),
        **normalisation(processor),
    )
