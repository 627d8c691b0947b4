"""LLaVA-1.5: a CLIP tower with a CLS token, an MLP projector, a Llama language model (arXiv 2310.03744)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import LlavaConfig

from flashvlm.errors import CheckpointError
from flashvlm.graph_io import VISION
from flashvlm.tilings import Single
from flashvlm.visual import VisualSpec
from flashvlm_export.families.common import names, pixels, saliency
from flashvlm_export.families.common.text import TEXT_TYPES, check_sections, check_token, expect
from flashvlm_export.families.common.text import build as build
from flashvlm_export.families.common.text import embedding_name as embedding_name
from flashvlm_export.families.common.text import language as language
from flashvlm_export.families.common.text import language_section as language_section
from flashvlm_export.families.common.text import language_spec as language_spec
from flashvlm_export.families.common.text import tied_head as tied_head
from flashvlm_export.families.contract import TowerSpec, VisualOptions

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

NAME = "llava"
ALIASES = {"llava-1.5-7b": "llava-hf/llava-1.5-7b-hf", "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf"}
REFUSED = {
    "llava_next": "it cuts images into tiles",
    "llava_next_video": "it cuts images into tiles",
    "llava_onevision": "it cuts images into tiles",
    "video_llava": "it has a second tower, for video",
    "vipllava": "it joins the features of several vision blocks",
}
VISION_TYPES = ("clip_vision_model",)


def _sizes(hidden: int, layers: int, heads: int, inter: int) -> dict[str, Any]:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    text = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
    }
    return {
        "model_type": "llava",
        "dtype": "float16",
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vision_config": vision,
        "text_config": text,
    }


# What decides sizes in the config.json of the models that have a short name, so that planning needs no network.
CONFIGS = {"llava-1.5-7b": _sizes(4096, 32, 32, 11008), "llava-1.5-13b": _sizes(5120, 40, 40, 13824)}


class Vision(nn.Module):
    """pixel_values [B,3,H,W] -> image_tokens [B,N,D], features [B,N,Dv], saliency [B,N] float32.

    Saliency is that of the block that yields the features.
    """

    def __init__(self, model: LlavaForConditionalGeneration, blocks: int) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.multi_modal_projector = model.model.multi_modal_projector
        # Later blocks feed nothing: LLaVA-1.5 takes its features from block -2.
        self.vision_tower.encoder.layers = self.vision_tower.encoder.layers[:blocks]

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tower = self.vision_tower(pixel_values, output_attentions=True)
        features = tower.last_hidden_state[:, 1:]  # [B,N,Dv], CLS dropped
        return self.multi_modal_projector(features), features, saliency.of_cls(tower.attentions[-1])


def read_config(config: dict[str, Any]) -> LlavaConfig:
    """Parses and checks a ``config.json``.

    Raises:
        CheckpointError: a variant of LLaVA this family does not cover.
    """
    parsed = LlavaConfig.from_dict(check_sections(config, NAME))
    expect(
        NAME,
        ("vision_config.model_type", parsed.vision_config.model_type, VISION_TYPES),
        ("text_config.model_type", parsed.text_config.model_type, TEXT_TYPES),
        ("vision_feature_select_strategy", parsed.vision_feature_select_strategy, ("default",)),
    )
    check_token("image_token_index", parsed.image_token_id, parsed.text_config.vocab_size)
    vision_blocks(parsed)
    return parsed


def vision_blocks(config: LlavaConfig) -> int:
    """How many vision blocks run before the features are taken."""
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int) or not -depth <= layer <= depth or layer == 0:
        raise CheckpointError(f"config.json: vision_feature_layer is {layer!r}; expected one block of the {depth}")
    return layer if layer > 0 else depth + 1 + layer


def vision(model: LlavaForConditionalGeneration, spec: VisualSpec) -> nn.Module:
    return Vision(model, vision_blocks(model.config))


def tower_specs(config: LlavaConfig, options: VisualOptions) -> list[TowerSpec]:
    options.refuse(NAME)
    tower, patches = config.vision_config, _side(config) ** 2
    return [
        TowerSpec(
            tokens=patches + 1,  # and CLS
            width=tower.hidden_size,
            heads=tower.num_attention_heads,
            intermediate=tower.intermediate_size,
            pixels=3 * tower.image_size**2,
            candidates=patches,
            features=tower.hidden_size,
        )
    ]


def _side(config: LlavaConfig) -> int:
    """Patches along an edge."""
    return config.vision_config.image_size // config.vision_config.patch_size


def visual_specs(config: LlavaConfig, image_processor: Any, options: VisualOptions) -> list[VisualSpec]:
    options.refuse(NAME)
    side = _side(config)
    return [
        VisualSpec(
            graph=VISION,
            placeholder_id=config.image_token_id,
            tokens_per_unit=side * side,
            grid=(side, side),
            candidates=side * side,
            feature_size=config.vision_config.hidden_size,
            pixels=_pixels(image_processor, config.vision_config.image_size),
        )
    ]


def _pixels(p: Any, side: int) -> Single:
    """The image processor's settings in the bundle's own terms, checked against the tower's ``side`` in pixels."""
    size, crop = dict(p.size), dict(p.crop_size)
    if not p.do_center_crop or "shortest_edge" not in size:
        raise CheckpointError("preprocessor_config.json: expected resize by shortest edge and center crop")
    if (crop["height"], crop["width"]) != (side, side):
        raise CheckpointError(f"preprocessor_config.json: crop_size is {crop}; the vision tower takes {side} x {side}")
    return Single(
        resize="shortest_edge",
        size=(size["shortest_edge"], size["shortest_edge"]),
        crop=(side, side),
        **pixels.normalisation(p),
    )


def canonical_name(name: str) -> str | None:
    return names.renamed(name, names.LLAVA_RENAMES)


def is_unused(config: LlavaConfig, name: str) -> bool:
    """The tower behind the block the features come from, and its final norm."""
    block = re.match(r"model\.vision_tower\.encoder\.layers\.(\d+)\.", name)
    if block:
        return int(block[1]) >= vision_blocks(config)
    return name.startswith("model.vision_tower.post_layernorm.")
