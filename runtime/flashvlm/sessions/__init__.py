"""Sessions run the graphs of a bundle on one backend. All of them offer what ``Session`` states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision graph says of one image: image_tokens [N,D], features [N,Dv], saliency float32 [N]."""

    image_tokens: np.ndarray
    features: np.ndarray
    saliency: np.ndarray


@dataclass(frozen=True)
class Selected:
    """What a select graph keeps of a batch of images: visual_embeds [B,K,D], kept int64 [B,K] ascending,
    is_top bool [B,K] (kept for its score, not as a representative), scores float32 [B,N]."""

    visual_embeds: np.ndarray
    kept: np.ndarray
    is_top: np.ndarray
    scores: np.ndarray


class Session(Protocol):
    """Runs vision, select and decoder. Arrays at this border are in the bundle's dtype unless stated."""

    def prepare(self, budget: int | None) -> None:
        """Loads what answers at this budget need (None: all tokens), so that stages measure only work."""

    def vision(self, pixel_values: np.ndarray) -> list[ImageFeatures]:
        """float32 [B,3,H,W] -> features of each image."""

    def select(
        self, budget: int, images: list[ImageFeatures], query_embeds: np.ndarray, query_mask: np.ndarray
    ) -> Selected:
        """One question an image: query_embeds [B,L,D], query_mask bool [B,L]."""

    def new_cache(self, batch: int, capacity: int) -> Any:
        """An empty KV cache for ``capacity`` tokens a row."""

    def decode(
        self,
        inputs_embeds: np.ndarray,
        position_ids: np.ndarray,
        cache_position: np.ndarray,
        num_tokens: np.ndarray,
        cache: Any,
    ) -> np.ndarray:
        """One chunk: embeds [B,S,D], positions int64 [B,S], first slot and number of real tokens int64 [B].

        Writes the cache in place; returns float32 logits [B,V] of each row's last real token.
        """
