"""SigLIP as a tower: no CLS token, so that what each patch receives in its last block is its saliency."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashvlm_export.families.common import saliency
from flashvlm_export.families.contract import TowerSpec

SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


def side(config: Any) -> int:
    """Patches along an edge."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def through(blocks: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Embedded patches [U,T,Dv] -> what the last block gives [U,T,Dv], and what each patch receives in it [U,T].
    ``saliency.receives`` of the last block's attention is for the module around it."""
    *before, last = blocks
    for block in before:
        hidden = block(hidden, None)
    attended, weights = last.self_attn(last.layer_norm1(hidden))
    hidden = hidden + attended
    return hidden + last.mlp(last.layer_norm2(hidden)), saliency.of_received(weights)


def tower_spec(config: Any, candidates: int, units: int) -> TowerSpec:
    tower = config.vision_config
    return TowerSpec(
        tokens=side(config) ** 2,
        width=tower.hidden_size,
        heads=tower.num_attention_heads,
        intermediate=tower.intermediate_size,
        pixels=3 * tower.image_size**2,
        candidates=candidates,
        features=tower.hidden_size,
        units=units,
    )
