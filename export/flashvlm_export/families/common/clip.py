"""CLIP as the tower of LLaVA and its descendants: a CLS token, and features that leave before the last block."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from flashvlm.errors import CheckpointError
from flashvlm_export.families.common import saliency
from flashvlm_export.families.contract import TowerSpec

TYPES = ("clip_vision_model",)


def vit_l(image_size: int) -> dict[str, Any]:
    """The ``vision_config`` of CLIP ViT-L/14."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": image_size,
        "patch_size": 14,
        "projection_dim": 768,
    }


def side(config: Any) -> int:
    """Patches along an edge."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def blocks(config: Any) -> int:
    """How many blocks run before the features are taken.

    Raises:
        CheckpointError: ``vision_feature_layer`` is not one block.
    """
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int) or not -depth <= layer <= depth or layer == 0:
        raise CheckpointError(f"config.json: vision_feature_layer is {layer!r}; expected one block of the {depth}")
    return layer if layer > 0 else depth + 1 + layer


def cut(tower: Any, config: Any) -> Any:
    """The tower without the blocks behind its features, which feed nothing."""
    tower.encoder.layers = tower.encoder.layers[: blocks(config)]
    return tower


def see(tower: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """pixel_values [U,3,H,W] -> features [U,n,Dv] without CLS, and saliency [U,n] of the block that yields them."""
    seen = tower(pixel_values, output_attentions=True)
    return seen.last_hidden_state[:, 1:], saliency.of_cls(seen.attentions[-1])


def is_behind(config: Any, name: str) -> bool:
    """Whether a parameter is of a block behind the features, or of the tower's final norm."""
    block = re.match(r"model\.\w+_tower\.encoder\.layers\.(\d+)\.", name)
    if block:
        return int(block[1]) >= blocks(config)
    return re.match(r"model\.\w+_tower\.post_layernorm\.", name) is not None


def tower_spec(config: Any, candidates: int, units: int = 1) -> TowerSpec:
    tower = config.vision_config
    return TowerSpec(
        tokens=side(config) ** 2 + 1,  # and CLS
        width=tower.hidden_size,
        heads=tower.num_attention_heads,
        intermediate=tower.intermediate_size,
        pixels=3 * tower.image_size**2,
        candidates=candidates,
        features=tower.hidden_size,
        units=units,
    )
