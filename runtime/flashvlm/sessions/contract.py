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


def select_inputs(images: Sequence[ImageFeatures]) -> dict[str, list[Array]]:
    """What a selection graph takes of vision: one array an image for each input, to be stacked."""
    own = {
        "image_tokens": [image.image_tokens for image in images],
        "features": [image.features for image in images],
        "saliency": [image.saliency for image in images],
    }
    return own | {name: [image.streams[name] for image in images] for name in images[0].streams}


def selected_of(
    outputs: Mapping[str, Array], streams: Sequence[str], row: Callable[[Array, int], Array] = _row
) -> list[Selected]:
    """What a selection graph gives, [B,...] each -> what is kept of each image. kept, is_top and scores are host's."""
    return [
        Selected(
            visual_embeds=row(outputs["visual_embeds"], b),
            kept=outputs["kept"][b],
            is_top=outputs["is_top"][b],
            scores=outputs["scores"][b],
            streams={name: row(outputs[visual_stream(name)], b) for name in streams},
        )
        for b in range(outputs["scores"].shape[0])
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
