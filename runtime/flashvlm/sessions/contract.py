"""Arrays and the contract of a graph: dtype, rank and sizes as the bundle's manifest states them, and which output of
one graph is which input of the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flashvlm.dtypes import NUMPY_DTYPES
from flashvlm.errors import FlashVLMError
from flashvlm.graph_io import TensorSpec, visual_stream
from flashvlm.sessions import Array, ImageFeatures, Selected


def check(spec: TensorSpec, dtype: Any, shape: Sequence[int], symbols: dict[str, int]) -> None:
    """Refuses a tensor that is not as ``spec`` says. ``symbols`` holds the sizes met so far, and learns new ones."""

    def fits(dimension: int | str, size: int) -> bool:
        return size == (symbols.setdefault(dimension, size) if isinstance(dimension, str) else dimension)

    same_rank = len(shape) == len(spec.shape)
    if np.dtype(dtype) != NUMPY_DTYPES[spec.dtype] or not same_rank or not all(map(fits, spec.shape, shape)):
        raise FlashVLMError(
            f"{spec.name}: expected {spec.dtype} {list(spec.shape)}, found {np.dtype(dtype)} {list(shape)}"
        )


def shape_of(spec: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of a tensor with its symbols replaced."""
    return tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)


def _row(array: Array, item: int) -> Array:
    return array[item]


def _rows(array: Array, start: int, stop: int) -> Array:
    return array[start:stop]


def features_of(outputs: Mapping[str, Array], row: Callable[[Array, int], Array] = _row) -> list[ImageFeatures]:
    """What a vision graph gives, [B,...] each -> features of each image."""
    streams = {name: array for name, array in outputs.items() if name not in ("image_tokens", "features", "saliency")}
    return [
        ImageFeatures(
            image_tokens=row(outputs["image_tokens"], b),
            features=row(outputs["features"], b),
            saliency=row(outputs["saliency"], b),
            streams={name: row(array, b) for name, array in streams.items()},
        )
        for b in range(outputs["saliency"].shape[0])
    ]


def select_inputs(
    images: Sequence[ImageFeatures],
    valid: np.ndarray,
    stack: Callable[[list[Array]], Array],
    rows: Callable[[Array, int, int], Array] = _rows,
) -> dict[str, Array]:
    """What a selection graph takes of vision: [R,n,...] each, for valid bool [R,n], whose rows are the images, or the
    units of each image (then [n,...] of R / B units stand one after another in its features)."""
    names = ("image_tokens", "features", "saliency", *images[0].streams)
    each = [
        {"image_tokens": image.image_tokens, "features": image.features, "saliency": image.saliency, **image.streams}
        for image in images
    ]
    tokens = valid.size // len(images)
    stacked = {name: stack([rows(image[name], 0, tokens) for image in each]) for name in names}
    return {name: array.reshape(*valid.shape, *array.shape[2:]) for name, array in stacked.items()}


def selected_of(
    outputs: Mapping[str, Array], streams: Sequence[str], images: int, row: Callable[[Array, int], Array] = _row
) -> list[Selected]:
    """What a selection graph gives, [R,...] each -> what is kept of each image, the rows of its units put together.
    kept, is_top and scores are host's."""
    rows, n = outputs["scores"].shape
    units = rows // images
    whole = {name: a.reshape(images, units * a.shape[1], *a.shape[2:]) for name, a in outputs.items()}
    first = n * np.arange(units).repeat(outputs["kept"].shape[1])  # token of the unit that each is kept of
    return [
        Selected(
            visual_embeds=row(whole["visual_embeds"], b),
            kept=whole["kept"][b] + first,
            is_top=whole["is_top"][b],
            scores=whole["scores"][b],
            streams={name: row(whole[visual_stream(name)], b) for name in streams},
        )
        for b in range(images)
    ]


def with_streams(tensors: Mapping[str, Array], specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Tensors of a chunk, with zeros for the streams that are not among them: text alone has none."""
    sizes = dict(zip(("batch", "sequence"), tensors["inputs_embeds"].shape, strict=False))
    return {
        spec.name: tensors[spec.name]
        if spec.name in tensors
        else np.zeros(shape_of(spec, sizes), NUMPY_DTYPES[spec.dtype])
        for spec in specs
    }
