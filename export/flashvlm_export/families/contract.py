"""What a model family is to the exporter: everything asked of one, and nothing of it is known elsewhere.

A family is a module with these names; ``llava.py`` is one to read beside this, and ``common/text.py`` has those of them
that most families share.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn

from flashvlm.errors import FlashVLMError
from flashvlm.visual import VisualSpec


@dataclass(frozen=True)
class LanguageSpec:
    """Sizes of a language model, in channels, heads and tokens.

    vocab          rows of the embedding table
    max_seq        positions it was made for
    position_axes  of position_ids: 1, or 3 for time, height and width
    streams        what goes to the language model beside inputs_embeds: width Ds of each, by name
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_seq: int
    position_axes: Literal[1, 3] = 1
    streams: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TowerSpec:
    """Sizes of a vision tower at its largest image, for planning memory before there is an image processor.

    units       tiles or frames U
    tokens      of a unit inside the tower, with those that it drops at its end
    pixels      numbers of a unit: C * H * W
    candidates  visual tokens N of the image
    features    width Dv of what the selection partitions
    """

    tokens: int
    width: int
    heads: int
    intermediate: int
    pixels: int
    candidates: int
    features: int
    units: int = 1


@dataclass(frozen=True)
class VisualOptions:
    """What an export may ask of a family's images and videos.

    image_sizes  (height, width) in pixels: a vision graph for each
    max_tiles    that one image is cut into, without its thumbnail
    frames       of a video at most: a vision graph for them
    scope        of a budget: tile, that each tile of an image has its share; frame, each frame of a video
    """

    image_sizes: tuple[tuple[int, int], ...] = ()
    max_tiles: int | None = None
    frames: int | None = None
    scope: frozenset[Literal["tile", "frame"]] = frozenset()

    def refuse(self, family: str, *, but: Collection[str] = ()) -> None:
        """Raises FlashVLMError for anything asked that is no field in ``but``."""
        sizes = ",".join(f"{height}x{width}" for height, width in self.image_sizes)
        for name, flag, asked, has in (
            ("image_sizes", "--image-size", sizes, "images of one size"),
            ("max_tiles", "--max-tiles", self.max_tiles, "no tiles"),
            ("frames", "--frames", self.frames, "no videos"),
        ):
            if asked and name not in but:
                raise FlashVLMError(f"{flag} {asked}: family {family} has {has}; leave it out")


class Family(Protocol):
    """One family of models.

    NAME     the ``model_type`` of its ``config.json``
    CONFIGS  what decides sizes in the ``config.json`` of models that have a short name: planning needs no network
    ALIASES  short name -> Hub id
    REFUSED  model types that one may take for this family, each with what it needs that is not here
    """

    NAME: str
    CONFIGS: dict[str, dict[str, Any]]
    ALIASES: dict[str, str]
    REFUSED: dict[str, str]

    # --- configuration: ``Any`` is the family's own class ---

    def read_config(self, config: dict[str, Any]) -> Any:
        """Parses a ``config.json`` whose numbers are in range (``config_bounds``; a family may check more of them).

        Raises:
            CheckpointError: quantized weights, attention the decoder does not have, a variant not covered; by name.
        """

    def language_section(self, config: dict[str, Any]) -> dict[str, Any]:
        """The part of a ``config.json`` that is about the language model: its dtype and stop tokens."""

    def language_spec(self, config: Any) -> LanguageSpec: ...

    def tower_specs(self, config: Any, options: VisualOptions) -> list[TowerSpec]:
        """Of each vision graph, by what ``config.json`` alone can tell. Raises FlashVLMError as ``visual_specs``."""

    def visual_specs(self, config: Any, image_processor: Any, options: VisualOptions) -> list[VisualSpec]:
        """One for each modality and size. ``image_processor`` is transformers', by PIL.

        Raises:
            CheckpointError: settings of the image processor that the bundle cannot state, or another size.
        """

    # --- model ---

    def build(self, config: Any, dtype: torch.dtype) -> nn.Module:
        """transformers' own model, weights in ``dtype``; called under ``torch.device("meta")``."""

    def language(self, model: Any) -> tuple[nn.Module, nn.Module]:
        """The layers with their final norm, and the output head [D] -> [V].

        The layers are called as transformers calls its language models: ``inputs_embeds`` [B,S,D], ``position_ids``
        [B,S] or [B,3,S], ``attention_mask`` [B,1,S,C] additive, ``past_key_values``, ``use_cache``, and each stream
        [B,S,Ds] by its name; ``last_hidden_state`` [B,S,D] comes back. A stock model that does otherwise is wrapped or
        patched here.
        """

    def vision(self, model: Any, spec: VisualSpec) -> nn.Module:
        """The tower and projector of one vision graph.

        pixel_values [B,C,H,W] -> image_tokens [B,N,D], features [B,N,Dv], saliency float32 [B,N], each stream [B,N,Ds]
        in the order of ``LanguageSpec.streams``. A tiled one takes [U,C,H,W] and ``order`` [N], and gives batch 1:
        ``common.tiles.in_reading_order``.
        """

    # --- weights: parameters go by the path of their module in ``build``'s model ---

    def embedding_name(self, config: Any) -> str:
        """The token embedding table [V,D]."""

    def tied_head(self, config: Any) -> str | None:
        """The output head where it is the embedding table; None where it has weights of its own."""

    def canonical_name(self, name: str) -> str | None:
        """A checkpoint's name for a parameter -> ours; None for a buffer that is computed instead."""

    def is_unused(self, config: Any, name: str) -> bool:
        """Whether a parameter feeds no graph. Every other one has to be in one."""
