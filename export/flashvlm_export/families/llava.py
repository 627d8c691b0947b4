"""LLaVA-1.5: a CLIP tower with a CLS token, an MLP projector, a Llama language model (arXiv 2310.03744)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import LlavaConfig

from flashvlm.graph_io import VISION
from flashvlm.visual import VisualSpec
from flashvlm_export.families.common import clip, names, pixels
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
    "vipllava": "it joins the features of several vision blocks",
}


def _sizes(hidden: int, layers: int, heads: int, inter: int) -> dict[str, Any]:
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
        "vision_config": clip.vit_l(336),
        "text_config": text,
    }


# What decides sizes in the config.json of the models that have a short name, so that planning needs no network.
CONFIGS = {"llava-1.5-7b": _sizes(4096, 32, 32, 11008), "llava-1.5-13b": _sizes(5120, 40, 40, 13824)}


class Vision(nn.Module):
    """pixel_values [B,3,H,W] -> image_tokens [B,N,D], features [B,N,Dv], saliency [B,N] float32.

    Saliency is that of the block that yields the features.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.vision_tower = clip.cut(model.model.vision_tower, model.config)
        self.multi_modal_projector = model.model.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, saliency = clip.see(self.vision_tower, pixel_values)
        return self.multi_modal_projector(features), features, saliency


def read_config(config: dict[str, Any]) -> LlavaConfig:
    """Parses and checks a ``config.json``.

    Raises:
        CheckpointError: a variant of LLaVA this family does not cover.
    """
    parsed = LlavaConfig.from_dict(check_sections(config, NAME))
    expect(
        NAME,
        ("vision_config.model_type", parsed.vision_config.model_type, clip.TYPES),
        ("text_config.model_type", parsed.text_config.model_type, TEXT_TYPES),
        ("vision_feature_select_strategy", parsed.vision_feature_select_strategy, ("default",)),
    )
    check_token("image_token_index", parsed.image_token_id, parsed.text_config.vocab_size)
    clip.blocks(parsed)
    return parsed


def vision(model: LlavaForConditionalGeneration, spec: VisualSpec) -> nn.Module:
    return Vision(model)


def tower_specs(config: LlavaConfig, options: VisualOptions) -> list[TowerSpec]:
    options.refuse(NAME)
    return [clip.tower_spec(config, clip.side(config) ** 2)]


def visual_specs(config: LlavaConfig, image_processor: Any, options: VisualOptions) -> list[VisualSpec]:
    options.refuse(NAME)
    side = clip.side(config)
    return [
        VisualSpec(
            graph=VISION,
            placeholder_id=config.image_token_id,
            tokens_per_unit=side * side,
            grid=(side, side),
            candidates=side * side,
            feature_size=config.vision_config.hidden_size,
            pixels=pixels.cropped(image_processor, config.vision_config.image_size),
        )
    ]


def canonical_name(name: str) -> str | None:
    return names.renamed(name, names.LLAVA_RENAMES)


def is_unused(config: LlavaConfig, name: str) -> bool:
    return clip.is_behind(config, name)
