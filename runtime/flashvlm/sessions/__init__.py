"""Sessions run the graphs of a bundle on one backend. All of them offer what ``Session`` states.

Between the stages of an answer, tensors stay where the session has them: ``Array`` is a numpy array on ONNX Runtime and
device memory on TensorRT, and only the session that made one looks inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from flashvlm.engines import TITLES
from flashvlm.errors import FlashVLMError

Array = Any


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision graph says of one image: image_tokens [N,D], features [N,Dv], saliency float32 [N], and streams
    [N,Ds] by name."""

    image_tokens: Array
    features: Array
    saliency: Array
    streams: Mapping[str, Array] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Array]:
        """Of every token, as the decoder reads them: inputs_embeds and the streams."""
        return {"inputs_embeds": self.image_tokens, **self.streams}


@dataclass(frozen=True)
class Selected:
    """What is kept of one image: visual_embeds [K,D] and streams [K,Ds] where the session has them; on the host kept
    int64 [K] ascending, is_top bool [K] (kept for its score, not as a representative), scores float32 [N]."""

    visual_embeds: Array
    kept: np.ndarray
    is_top: np.ndarray
    scores: np.ndarray
    streams: Mapping[str, Array] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Array]:
        """Of the kept tokens, as the decoder reads them: inputs_embeds and the streams."""
        return {"inputs_embeds": self.visual_embeds, **self.streams}


@dataclass(frozen=True)
class Segment:
    """Tokens ``start`` to ``stop`` of tensors [*,width] by name: inputs_embeds, and the streams that are not zero."""

    tensors: Mapping[str, Array]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Backend:
    """What runs the graphs.

    name         onnxruntime, tensorrt or tensorrt-rtx
    version      of that library
    device       in words, such as "cpu" or "cuda:0 NVIDIA L4"
    passed_over  why ``backend="auto"`` did not take engines the bundle has
    """

    name: str
    version: str
    device: str
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{TITLES[self.name]} {self.version}, {self.device}"


@dataclass(frozen=True)
class Limits:
    """The largest sizes a session takes; None for any.

    max_seq   KV slots of a row, prompt and answer together
    capacity  slots a cache has whatever was asked for; None: as asked
    holder    who sets them, for refusals: "this bundle holds"
    larger    what raises them to ``max_seq=`` or ``max_batch=``
    """

    max_seq: int
    max_batch: int | None = None
    capacity: int | None = None
    holder: str = "this bundle holds"
    larger: Callable[..., str] = lambda **sizes: f"export with --max-seq {sizes['max_seq']}"


def check_batch(size: int, limits: Limits) -> None:
    """Refuses more rows than fit."""
    if limits.max_batch is not None and size > limits.max_batch:
        raise FlashVLMError(
            f"{size} prompts at once: {limits.holder} {limits.max_batch}; ask fewer at a time, or "
            f"{limits.larger(max_batch=size)}"
        )


class Session(Protocol):
    """Runs vision, select and decoder. Host arrays at this border are in the bundle's dtype unless stated."""

    backend: Backend
    limits: Limits

    def prepare(self, graphs: Sequence[str]) -> None:
        """Loads these graphs, so that stages measure only work."""

    def vision(self, graph: str, pixel_values: np.ndarray, order: np.ndarray | None = None) -> list[ImageFeatures]:
        """float32 [B,C,H,W] -> features of each image; with an ``order`` int64 [N], [U,C,H,W] -> those of one image
        of U tiles."""

    def select(
        self,
        graph: str,
        images: Sequence[ImageFeatures],
        valid: np.ndarray,
        query_embeds: np.ndarray,
        query_mask: np.ndarray,
    ) -> list[Selected]:
        """One question an image: valid bool [B,N], query_embeds [B,L,D], query_mask bool [B,L].

        Of scope unit, [U,n], [U,L,D] and [U,L]: a question a unit of the one image, whose features are not copied.
        """

    def assemble(self, rows: Sequence[Sequence[Segment]]) -> Mapping[str, Array]:
        """Rows of segments, from the host or of this session -> inputs_embeds [B,S,D] and every stream [B,S,Ds], with
        zeros on the right, and where a segment lacks a stream."""

    def new_cache(self, batch: int, capacity: int) -> Any:
        """An empty KV cache for ``capacity`` tokens a row. Its memory is free again when the last reference goes."""

    def decode(
        self,
        tensors: Mapping[str, Array],
        position_ids: np.ndarray,
        cache_position: np.ndarray,
        num_tokens: np.ndarray,
        cache: Any,
    ) -> np.ndarray:
        """One chunk of S tokens: tensors assembled, or inputs_embeds [B,S,D] of text from the host; positions int64
        [B,S] or [B,3,S]; first slot and number of real tokens int64 [B].

        Writes the cache in place; returns float32 logits [B,V] of each row's last real token.
        """

    def close(self) -> None:
        """Frees what the session holds; it is not used afterwards."""
